"""Adapters in one process: what is trained, what is refused, and what a merge gives, against peft itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import pytest
import torch
from tests.support.decoders import decoder_config
from transformers import AutoModelForCausalLM, PreTrainedModel

from farspan.config.schema import LoraConfig
from farspan.errors import CheckpointError, ConfigError
from farspan.models.checkpoint import make_config, random_causal_lm, save_causal_lm
from farspan.models.lora import (
    Adapter,
    add_adapter,
    count_matrices,
    load_adapter,
    merge_folder,
    merged_weights,
    read_base,
    save_adapter,
)
from farspan.verify.shrink import small_model

SETTINGS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 77,
    "intermediate_size": 40,
}
TOKENS = torch.arange(20).unsqueeze(0)


def new_model(architecture: str = "llama", **settings: object) -> PreTrainedModel:
    return random_causal_lm(make_config(architecture, {**SETTINGS, **settings}), 3).eval()


def adapted(model: PreTrainedModel, frozen: torch.dtype = torch.float32, **lora: object) -> Adapter:
    config = LoraConfig(rank=4, **lora)  # type: ignore[arg-type]
    return add_adapter(model, config, "base", seed=1, frozen=frozen)


def fill(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Matrices as training might leave them; gives them by name."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_an_adapter_starts_without_effect_and_only_it_is_trained() -> None:
    want = new_model()(TOKENS).logits
    model = new_model()
    adapted(model)
    assert torch.equal(model(TOKENS).logits, want)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    # Seven linear layers in each of two decoder layers, two matrices each; the head is none of them.
    assert len(trained) == 28
    assert all(".lora_" in name for name in trained)


def test_the_frozen_model_is_kept_in_the_compute_type_and_the_matrices_in_fp32() -> None:
    model = new_model()
    adapted(model, frozen=torch.bfloat16)
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_random_matrices_depend_on_the_seed_alone() -> None:
    first, second = new_model(), new_model()
    state = torch.random.get_rng_state()
    adapted(first)
    torch.rand(3)
    adapted(second)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    torch.random.set_rng_state(state)


@pytest.mark.parametrize(
    ("targets", "reason"),
    [(["nonsense"], "nonsense"), (["lm_head"], "head"), (["embed_tokens"], "not a linear layer")],
)
def test_targets_that_are_not_inner_linear_layers_are_refused(targets: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"lora.targets: must name linear layers .*{reason}"):
        adapted(new_model(), targets=targets)


def test_where_all_linear_takes_a_router_in_the_refusal_names_targets_that_work() -> None:
    with pytest.raises(ConfigError, match=r"mlp.gate is the head or not a linear layer") as refused:
        adapted(small_model(decoder_config("qwen3_next")), targets=["all-linear"])
    named = re.search(r"use lora.targets=\[(.*)\] or some of them", str(refused.value))
    assert named is not None
    targets = named[1].split(",")
    assert {"in_proj_qkvz", "q_proj", "o_proj"} <= set(targets)
    model = small_model(decoder_config("qwen3_next"))
    adapted(model, targets=targets)
    layers = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {layer.rpartition(".")[2] for layer in layers} == set(targets)


@pytest.mark.parametrize(
    ("architecture", "settings", "close"),
    [
        ("llama", {"tie_word_embeddings": True}, 1e-12),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2}, 1e-12),
        ("gemma3_text", {"num_key_value_heads": 1, "head_dim": 16}, 1e-6),
    ],
    # Gemma takes its norms in fp32, whatever its type.
    ids=["tied", "transposed", "gemma3"],
)
def test_merged_weights_compute_what_model_and_adapter_compute(
    architecture: str, settings: dict[str, object], close: float, tmp_path: Path
) -> None:
    names = {} if architecture == "gpt2" else SETTINGS
    config = make_config(architecture, {**names, "vocab_size": 77, **settings})
    model = random_causal_lm(config, 3).double().eval()
    adapter = adapted(model, frozen=torch.float64)
    fill(model)
    want = model(TOKENS).logits
    merged = merged_weights(config, adapter.config, model.state_dict(), torch.float64)
    save_causal_lm(tmp_path, config, merged, None)
    got = AutoModelForCausalLM.from_pretrained(tmp_path).double().eval()(TOKENS).logits
    assert torch.allclose(got, want, rtol=close, atol=close)


def test_a_saved_adapter_is_one_peft_opens_and_loads_back_bit_for_bit(tmp_path: Path) -> None:
    model = new_model()
    adapter = adapted(model, targets=["q_proj", "down_proj"])
    weights = fill(model)
    save_adapter(tmp_path, adapter, weights)
    loaded = load_adapter(tmp_path, adapter)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    by_peft = peft.PeftModel.from_pretrained(new_model(), str(tmp_path)).eval()
    assert torch.equal(by_peft(TOKENS).logits, model(TOKENS).logits)
    merged = merge_folder(new_model(), tmp_path)
    assert torch.allclose(merged(TOKENS).logits, model(TOKENS).logits, atol=1e-6)


def test_an_adapter_of_a_random_or_another_model_is_not_merged(tmp_path: Path) -> None:
    model = new_model()
    save_adapter(tmp_path, adapted(model), fill(model))
    with pytest.raises(CheckpointError, match="trained beside other weights than those of base"):
        merge_folder(new_model(hidden_act="silu", vocab_size=78), tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**saved, "base_model_name_or_path": "random weights of llama, seed 0"})
    )
    with pytest.raises(CheckpointError, match="use the run's own `model` folder"):
        read_base(tmp_path)


def test_the_plan_counts_the_matrices_that_are_made() -> None:
    model = new_model()
    adapted(model)
    assert count_matrices(model.config, LoraConfig(rank=4)) == sum(t.numel() for t in fill(model).values())
