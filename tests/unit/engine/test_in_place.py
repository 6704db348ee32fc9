"""In single precision pages are read where they lie: windows, pages that are gone and shared beginnings, at once."""

from __future__ import annotations

import shutil

import pytest
import torch
from tests.support.zoo import VOCAB, zoo_model
from tests.unit.engine.oracle import whole_logits
from tests.unit.engine.tiny import engine_config

from farspan.engine.engine import Engine
from farspan.engine.request import SamplingParams

LAYERS = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
# What its layers see, and whether rows share their beginning: soft caps and sinks keep theirs to themselves on a CPU.
CASES = [("llama", {}, True), ("gemma3_text", LAYERS, True), ("mistral", {}, False), ("gpt_oss", {}, False)]


def row(length: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
@pytest.mark.parametrize(("architecture", "settings", "shares"), CASES, ids=[case[0] for case in CASES])
def test_answers_over_pages_read_in_place_are_the_models_also_with_gone_pages_and_shared_beginnings(
    architecture, settings, shares
):
    model = zoo_model(architecture, torch.float32, **settings)
    engine = Engine(model, engine_config(dtype="float32", max_batch_tokens=16))
    shared: list[int] = []
    decode_rows = engine._runner._decode_rows

    def watched(rows, seen, group, part, pages):
        shared.append(pages)
        return decode_rows(rows, seen, group, part, pages)

    engine._runner._decode_rows = watched  # type: ignore[method-assign]
    trunk = row(40, 0)
    engine.generate([trunk], SamplingParams(max_tokens=1))
    prompts = [trunk + row(3 + n, 1 + n) for n in range(6)] + [row(25, 9)]
    answers = engine.generate(prompts, SamplingParams(max_tokens=20))
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = whole_logits(model, [*prompt, *answer.tokens])[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        # The best token, or one that only the order of sums tells from it.
        assert float((logits.amax(1) - chosen).max()) <= 1e-3 * float(logits.abs().max())
    assert len({token for answer in answers for token in answer.tokens}) >= 12, "a vacuous comparison"
    assert (max(shared) >= 8) == shares
    engine.check_integrity()
