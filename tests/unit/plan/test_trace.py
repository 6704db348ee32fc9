"""A trace without weights equals what the same model keeps when it really runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from farspan.models.attention import packed_hidden, use_farspan_attention
from farspan.models.checkpoint import make_config, random_causal_lm
from farspan.models.parts import decoder_layers
from farspan.parallel.documents import attend_documents
from farspan.parallel.whole import WholeSequence
from farspan.plan.meter import Meter
from farspan.plan.profile import KEPT, MOVED, ModelProfile, visible_pairs
from farspan.plan.trace import trace_model

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SMALL = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 4}
SMALL = {**SMALL, "intermediate_size": 160, "vocab_size": 211}
# One of every family of layers: plain, norms on q and k, windows, biases and partial rotary, experts, recurrent.
MODELS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen3": {**SMALL, "head_dim": 24},
    "gemma3_text": {
        **SMALL,
        "head_dim": 24,
        "sliding_window": 100,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
    "mistral": {**SMALL, "sliding_window": 64},
    "phi": {**SMALL, "num_key_value_heads": 6},
    "gpt_neox": {k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_next": {
        **SMALL,
        "head_dim": 32,
        "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
}


@pytest.fixture(scope="module")
def llama_8b() -> ModelProfile:
    return trace_model(make_config("llama", LLAMA_8B))


@cache
def small_profile(architecture: str) -> ModelProfile:
    return trace_model(make_config(architecture, MODELS[architecture]))


@contextmanager
def bytes_saved(model: nn.Module) -> Iterator[list[int]]:
    """Sum of all storages autograd keeps inside that are not the model's own, as the list's only entry."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []
    total: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # an address stays its own as long as somebody holds it
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total.append(sum(sizes.values()))


def live_model(config: PretrainedConfig) -> PreTrainedModel:
    model = random_causal_lm(config, 0).to(torch.bfloat16)
    use_farspan_attention(model)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("grouped_mm")
    return model.train()


def live_hidden(model: PreTrainedModel, tokens: int) -> Tensor:
    # Two documents, as a packed batch has.
    bounds = (0, tokens // 192 * 64, tokens)

    def attention(q: Tensor, k: Tensor, v: Tensor, **rule: Any) -> Tensor:
        return attend_documents(q, k, v, bounds, **rule)

    positions_T = torch.arange(tokens)
    return packed_hidden(model, positions_T % 200, positions_T, attention, WholeSequence(bounds))


@pytest.mark.parametrize("architecture", MODELS)
def test_bytes_kept_by_a_real_run_equal_the_trace_at_lengths_that_were_not_traced(architecture: str) -> None:
    profile, model = small_profile(architecture), live_model(make_config(architecture, MODELS[architecture]))
    assert profile.num_layers == 4
    for tokens in (192, 448):
        with bytes_saved(model) as live:
            hidden_TE = live_hidden(model, tokens)
        predicted = profile.outside_layers.saved(tokens) + sum(
            kind.count * kind.whole.saved(tokens) for kind in profile.kinds
        )
        assert predicted == pytest.approx(live[0], rel=0.01)
        del hidden_TE


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_peak_of_a_real_backward_equals_the_trace(architecture: str, recompute: bool) -> None:
    profile, tokens = small_profile(architecture), 700
    model = live_model(make_config(architecture, MODELS[architecture]))
    if recompute:
        for layer in decoder_layers(model):
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = _checkpoint
    live_hidden(model, 16)
    with Meter(model.parameters()) as meter:
        hidden_TE = live_hidden(model, tokens)
        after_forward = meter.mark()
        hidden_TE.backward(torch.ones_like(hidden_TE))
    kept = sum(
        kind.count * (kind.boundary if recompute else kind.whole.saved)(tokens) for kind in profile.kinds
    ) + profile.outside_layers.saved(tokens)
    # What this test holds itself: tokens and positions, the output, and later the gradient it begins with.
    held = hidden_TE.numel() * hidden_TE.element_size()
    kept += held + 2 * 8 * tokens
    assert kept == pytest.approx(after_forward, rel=0.01)
    work = max((k.whole.recompute_peak if recompute else k.whole.backward_peak)(tokens) for k in profile.kinds)
    work = max(work - profile.outside_layers.tail_saved(tokens), profile.outside_layers.tail_peak(tokens))
    assert kept + held + work == pytest.approx(meter.peak, rel=0.02)


def _checkpoint(function: Any, *args: Any) -> Any:
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)


def test_recurrent_layers_share_only_what_is_outside_their_mixer() -> None:
    profile = small_profile("qwen3_next")
    recurrent = next(kind for kind in profile.kinds if kind.attention is None)
    assert recurrent.rest is not None
    assert 0 < recurrent.rest.saved.c1 < recurrent.whole.saved.c1
    assert all(kind.rest is None for kind in profile.kinds if kind.attention is not None)


def test_the_published_constants_of_an_8b_llama_come_out_of_the_trace() -> None:
    profile = trace_model(make_config("llama", LLAMA_8B), attention="sdpa")
    (kind,) = profile.kinds
    # transformers' own attention repeats keys and values for every query head and keeps them.
    assert kind.whole.saved.c1 == pytest.approx(213_128, rel=1e-3)
    assert kind.boundary.c1 == 8_192
    assert profile.loss.saved.c1 == 521_216


def test_farspans_attention_keeps_no_repeated_keys(llama_8b: ModelProfile) -> None:
    (kind,) = llama_8b.kinds
    assert kind.whole.saved.c1 == 213_128 - 2 * (32 - 8) * 128 * 2
    assert kind.boundary.c1 == 8_192
    assert (kind.whole.saved.c0, kind.whole.saved.c2) == (0, 0)
    assert llama_8b.arena_bytes == llama_8b.checkpoint_bytes == 32 * 8_192


def test_operations_equal_two_for_every_weight_and_token(llama_8b: ModelProfile) -> None:
    (kind,) = llama_8b.kinds
    norms = 2 * 4096
    assert kind.whole.forward.flops.c1 == 2 * (kind.num_parameters - norms)
    assert kind.whole.backward.flops.c1 == 2 * kind.whole.forward.flops.c1
    assert llama_8b.num_parameters == 8_030_261_248
    assert llama_8b.root_parameters == 2 * 128256 * 4096 + 4096


def test_a_hidden_square_of_the_sequence_is_named(llama_8b: ModelProfile) -> None:
    assert llama_8b.quadratics == ()
    eager = trace_model(make_config("llama", SMALL), attention="eager")
    kept = {item.where: item.bytes_per_token_pair for item in eager.quadratics if item.how == KEPT}
    # Two traced layers keep 6 heads of fp32 scores each.
    assert kept["model.layers.self_attn: aten._softmax"] == 2 * 6 * 4
    assert "kept until backward" in str(eager.quadratics[0])


def test_traffic_that_grows_with_the_square_is_named_too() -> None:
    # transformers' own recurrent layer writes a gradient of the whole sequence for every chunk of it.
    found = [item for item in small_profile("qwen3_next").quadratics if item.how == MOVED]
    assert [item.where for item in found] == ["recurrent layers, backward"]


@pytest.mark.parametrize("limits", [(None, None), (7, None), (None, 6)])
def test_visible_pairs_equal_a_count_of_the_mask(limits: tuple[int | None, int | None]) -> None:
    window, chunk = limits
    for tokens in (1, 5, 6, 7, 20):
        seen = sum(
            key <= query
            and (window is None or query - key < window)
            and (chunk is None or query // chunk == key // chunk)
            for query in range(tokens)
            for key in range(tokens)
        )
        assert visible_pairs(tokens, window, chunk) == seen
    lengths = [visible_pairs(tokens, window, chunk) for tokens in range(1, 30)]
    assert all(a < b for a, b in pairwise(lengths))
