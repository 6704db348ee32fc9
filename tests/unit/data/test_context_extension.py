"""Rope settings of the how-to reach the model: positions are stretched as transformers' formulas, and NTK's, say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from farspan.config.load import load_config
from farspan.config.schema import RunConfig
from farspan.errors import ModelError
from farspan.models.checkpoint import make_config, random_causal_lm
from farspan.models.rules import refuse_unsupported

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "how-to" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"`(model\.settings\.rope_parameters=[^`]*)`", PAGE)
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_documented_settings_stretch_the_positions_of_a_model(example: str) -> None:
    run = load_config(RunConfig, None, ["data.corpus=x", example])
    config = make_config("llama", {**TINY, **run.model.settings}, {"max_position_embeddings": 32768})
    refuse_unsupported(config)
    kind = run.model.settings["rope_parameters"]["rope_type"]
    found = random_causal_lm(config, 0).model.rotary_emb.inv_freq
    plain = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    if kind == "ntk":
        expected = (10000.0 * 4.0 ** (16 / 14)) ** (-torch.arange(0, 16, 2) / 16)
    else:
        expected, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    torch.testing.assert_close(found, expected)
    # The slowest frequency turns as much over four times the length as it did before.
    assert found[-1] == pytest.approx(plain[-1].item() / 4, rel=1e-5)


def test_the_page_shows_yarn_ntk_and_linear() -> None:
    assert [example.split("rope_type: ")[1].split(",")[0] for example in EXAMPLES] == ["yarn", "ntk", "linear"]


def test_frequencies_that_depend_on_the_batch_are_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    with pytest.raises(ModelError, match="use default, linear, ntk, llama3 or yarn"):
        refuse_unsupported(make_config("llama", {**TINY, "rope_parameters": rope}, {}))
