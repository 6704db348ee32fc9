"""Model folders: what is written is what transformers reads; what is wrong is refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from farspan.errors import CheckpointError, ConfigError, ModelError
from farspan.models.checkpoint import check_model_folder, load_causal_lm, make_config, random_causal_lm, save_causal_lm

SETTINGS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 77,
    "intermediate_size": 40,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = make_config("llama", {**SETTINGS, "tie_word_embeddings": True})
    save_causal_lm(tmp_path / "model", config, random_causal_lm(config, 3).state_dict(), None)
    return tmp_path / "model"


def test_a_saved_model_loads_in_transformers_with_the_same_logits(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = make_config("llama", {**SETTINGS, "tie_word_embeddings": True})
    tokens = torch.arange(20).unsqueeze(0)
    want = random_causal_lm(config, 3).eval()(tokens).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(tokens).logits, want)
    assert torch.equal(load_causal_lm(folder, torch.float32)(tokens).logits, want)


def test_a_tied_weight_is_written_once(folder: Path) -> None:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118 - not a dict


def test_random_weights_depend_on_config_and_seed_alone() -> None:
    config = make_config("llama", SETTINGS)
    state = torch.random.get_rng_state()
    first, second, other = (random_causal_lm(config, seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_missing_tensor_is_refused_instead_of_made_up(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"weights do not fit config.json: missing or misshapen .*layers\.2"):
        load_causal_lm(folder, torch.float32)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"short", "weight file model.safetensors is torn"),
        ("model.safetensors", None, "has no weights; expected model.safetensors"),
        ("config.json", b"{", "config.json is not JSON"),
        ("config.json", b"[]", "config.json does not hold an object"),
        ("config.json", None, "has no config.json"),
    ],
)
def test_a_damaged_folder_is_refused(folder: Path, name: str, content: bytes | None, message: str) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        check_model_folder(folder)


def test_an_index_that_leads_out_of_the_folder_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/weights"}}')
    with pytest.raises(CheckpointError, match="names files outside the folder"):
        check_model_folder(folder)


def test_a_missing_tokenizer_is_refused_only_where_it_is_needed(folder: Path) -> None:
    check_model_folder(folder)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        check_model_folder(folder, tokenizer=True)


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(ModelError, match="'t5' has no causal language model"):
        make_config("t5", {})


def test_settings_transformers_rejects_are_one_config_error() -> None:
    with pytest.raises(ConfigError, match="hidden size \\(33\\) is not a multiple"):
        make_config("llama", {"hidden_size": 33, "num_attention_heads": 4})
