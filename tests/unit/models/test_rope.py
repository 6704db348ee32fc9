"""NTK-aware scaling: an ordinary theta, with which transformers alone computes the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from farspan.errors import ConfigError, ModelError
from farspan.models.checkpoint import load_causal_lm, make_config, open_config, random_causal_lm, save_causal_lm
from farspan.models.rope import ntk_theta, stretch_ntk, take_ntk
from farspan.models.rules import refuse_unsupported

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 77, "intermediate_size": 40}
TOKENS = torch.arange(40).unsqueeze(0)
NTK = {"rope_type": "ntk", "rope_theta": 5000.0, "factor": 4.0}
OLDER = {"type": "ntk", "factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 8.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def open_fields(folder: Path, fields: dict[str, Any]) -> PretrainedConfig:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))
    return open_config(folder)


def frequencies(architecture: str, ropes: dict[str, Any], name: str, **settings: Any) -> torch.Tensor:
    config = make_config(architecture, {**SIZES, **settings, "rope_parameters": ropes})
    refuse_unsupported(config)
    return dict(random_causal_lm(config, 0).named_buffers())[name]


def by_the_formula(theta: float, factor: float, rotary_dim: int) -> torch.Tensor:
    stretched = theta * factor ** (rotary_dim / (rotary_dim - 2))
    return stretched ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


@pytest.mark.parametrize(
    ("architecture", "name", "rotary_dim", "settings"),
    [
        ("llama", "model.rotary_emb.inv_freq", 32, {}),
        ("qwen3", "model.rotary_emb.inv_freq", 16, {"head_dim": 16, "num_key_value_heads": 2}),
        ("gpt_neox", "gpt_neox.rotary_emb.inv_freq", 8, {}),
    ],
    ids=["whole heads", "another head dim", "a quarter of a head"],
)
def test_frequencies_equal_the_formula(architecture: str, name: str, rotary_dim: int, settings: dict[str, Any]) -> None:
    found = frequencies(architecture, NTK, name, **settings)
    torch.testing.assert_close(found.double(), by_the_formula(5000.0, 4.0, rotary_dim), rtol=1e-6, atol=0)
    # The fastest dims turn as before; the slowest reach over four times the length what they reached before.
    plain = by_the_formula(5000.0, 1.0, rotary_dim)
    assert found[0] == plain[0] == 1.0
    assert found[-1].item() == pytest.approx(plain[-1].item() / 4.0, rel=1e-6)


def test_only_the_kind_of_layer_that_says_so_is_stretched_and_theta_may_be_the_models_own() -> None:
    ropes = {"full_attention": {"rope_type": "ntk", "factor": 8.0}}
    layers = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
    for kind, (theta, factor) in {"full_attention": (1e6, 8.0), "sliding_attention": (1e4, 1.0)}.items():
        found = frequencies("gemma3_text", ropes, f"model.rotary_emb.{kind}_inv_freq", **layers)
        torch.testing.assert_close(found.double(), by_the_formula(theta, factor, 16), rtol=1e-6, atol=0)


def test_the_saved_folder_says_an_ordinary_theta_and_transformers_computes_the_same_logits(tmp_path: Path) -> None:
    config = make_config("llama", {**SIZES, "rope_parameters": NTK})
    model = random_causal_lm(config, 3).eval()
    save_causal_lm(tmp_path, config, model.state_dict(), None)
    said = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    assert said == {"rope_type": "default", "rope_theta": ntk_theta(5000.0, 4.0, 32)}
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(TOKENS).logits, model(TOKENS).logits)
    assert open_config(tmp_path).rope_parameters == said, "nothing is stretched twice"


def test_a_folder_whose_config_says_ntk_is_the_same_model_stretched(tmp_path: Path) -> None:
    plain = make_config("llama", {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}})
    save_causal_lm(tmp_path, plain, random_causal_lm(plain, 3).state_dict(), None)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "rope_parameters": NTK}))
    stretched = random_causal_lm(make_config("llama", {**SIZES, "rope_parameters": NTK}), 0).eval()
    stretched.load_state_dict(load_file(tmp_path / "model.safetensors"))
    found = load_causal_lm(tmp_path, torch.float32)
    assert torch.equal(found(TOKENS).logits, stretched(TOKENS).logits)
    assert not torch.equal(found(TOKENS).logits, random_causal_lm(plain, 3).eval()(TOKENS).logits)


@pytest.mark.parametrize("factor", [None, 0.5, 0, -4.0, float("inf"), float("nan"), True, "4x"], ids=str)
def test_a_factor_that_stretches_nothing_is_refused(factor: object, tmp_path: Path) -> None:
    ropes = {"rope_type": "ntk", "rope_theta": 5000.0, "factor": factor}
    with pytest.raises(ConfigError, match=r"^model\.settings\.rope_parameters\.factor: must be how many times longer"):
        make_config("llama", {**SIZES, "rope_parameters": ropes})
    fields = {"model_type": "llama", **SIZES, "rope_parameters": ropes}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=r"config\.json: rope_parameters\.factor: must be how many times longer"):
        open_config(tmp_path)


def test_a_field_that_ntk_does_not_have_is_refused_by_name() -> None:
    ropes = {"full_attention": {**NTK, "original_max_position_embeddings": 8192}}
    with pytest.raises(ConfigError, match=r"full_attention\.original_max_position_embeddings: is not a field of .*ntk"):
        make_config("gemma3_text", {**SIZES, "rope_parameters": ropes})


@pytest.mark.parametrize(
    ("architecture", "settings", "reason"),
    [
        ("gemma3_text", {"head_dim": 16}, r"needs one rope for all layers .* got rotary dims \[\]"),
        ("llama", {"head_dim": 2}, r"more than one frequency, got rotary dims \[2\]"),
    ],
    ids=["a rope for each kind of layer", "one frequency"],
)
def test_a_model_without_such_a_rope_is_refused(architecture: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        make_config(architecture, {**SIZES, **settings, "rope_parameters": NTK})


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": LLAMA3, "rope_parameters": NTK},
        {"model_type": "gemma3_text", "rope_scaling": LINEAR, "rope_parameters": {"full_attention": NTK}},
        {"model_type": "gemma3", "text_config": {"rope_scaling": LINEAR, "rope_parameters": {"full_attention": NTK}}},
        {"model_type": "qwen2_vl", "rope_scaling": LINEAR, "text_config": {"rope_parameters": NTK}},
    ],
    ids=["one rope", "kinds of layers", "in the text part", "beside the text part"],
)
def test_ntk_never_comes_on_top_of_the_scaling_of_an_older_config(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rope_scaling: cannot stand beside rope_type ntk in .*got \{.*; leave one"):
        open_fields(tmp_path, fields)


def test_an_empty_rope_scaling_scales_nothing_and_is_no_hindrance(tmp_path: Path) -> None:
    for empty in (None, {}):
        config = open_fields(tmp_path, {**SIZES, "rope_scaling": empty, "rope_parameters": NTK})
        assert config.rope_parameters == {"rope_type": "default", "rope_theta": ntk_theta(5000.0, 4.0, 32)}


@pytest.mark.parametrize(
    ("fields", "said", "home"),
    [
        ({"rope_scaling": NTK}, "rope_scaling.rope_type", "rope_parameters"),
        ({"rope_scaling": OLDER}, "rope_scaling.type", "rope_parameters"),
        ({"rope_parameters": OLDER}, "rope_parameters.type", "rope_parameters"),
        ({"rope_parameters": {"full_attention": OLDER}}, "rope_parameters.full_attention.type", "rope_parameters"),
        ({"rope_parameters": {**NTK, "full_attention": {}}}, "rope_parameters.rope_type", "rope_parameters"),
        ({"text_config": {}, "rope_parameters": NTK}, "rope_parameters.rope_type", "text_config.rope_parameters"),
        ({"text_config": {"rope_scaling": NTK}}, "text_config.rope_scaling.rope_type", "rope_parameters"),
    ],
    ids=[
        "rope_scaling",
        "both older names",
        "type",
        "type of a kind",
        "beside kinds",
        "beside the text",
        "in the text",
    ],
)
def test_an_ntk_that_would_not_be_read_is_refused_by_name(
    fields: dict[str, Any], said: str, home: str, tmp_path: Path
) -> None:
    reason = f"{re.escape(said)}: is not where ntk is read, got 'ntk'; write rope_type: ntk in {re.escape(home)}, for"
    with pytest.raises(ConfigError, match=f"config.json: {reason}"):
        open_fields(tmp_path, fields)
    with pytest.raises(ConfigError, match=f"^{reason}"):
        take_ntk(fields, "")


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_kind_of_layer_that_the_model_does_not_have_is_refused(architecture: str, tmp_path: Path) -> None:
    ropes = {"rope_parameters": {"far_attention": {"rope_type": "ntk", "factor": 4.0}}}
    reason = rf"^{architecture}: rope_type ntk needs .*got rope_parameters\.far_attention .*; name the kinds of layers"
    with pytest.raises(ModelError, match=reason):
        make_config(architecture, {**SIZES, "head_dim": 16, **ropes})
    with pytest.raises(ModelError, match=reason):
        open_fields(tmp_path, {"model_type": architecture, **SIZES, "head_dim": 16, **ropes})


def test_a_model_without_rotary_positions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^gpt2: rope_type ntk needs .*got rope_parameters \{"):
        open_fields(tmp_path, {"model_type": "gpt2", "rope_parameters": {"rope_type": "ntk", "factor": 4.0}})


def test_a_config_that_transformers_scales_otherwise_is_never_stretched() -> None:
    config = make_config("llama", {**SIZES, "rope_parameters": {**LINEAR, "rope_theta": 5000.0}})
    with pytest.raises(ModelError, match=r"with rope_type default .*'linear'.*; .* leave out every other scaling"):
        stretch_ntk(config, {"": 4.0})
    assert config.rope_parameters["rope_theta"] == 5000.0


def test_the_text_part_of_a_config_is_read_as_a_whole_one_is_and_nothing_given_is_changed() -> None:
    fields = {"model_type": "gemma3", "text_config": {"rope_parameters": {"full_attention": dict(NTK)}}}
    before = json.dumps(fields)
    plain, factors = take_ntk(fields, "")
    assert plain["text_config"]["rope_parameters"] == {"full_attention": {"rope_type": "default", "rope_theta": 5000.0}}
    assert factors == {"full_attention": 4.0}
    assert json.dumps(fields) == before
