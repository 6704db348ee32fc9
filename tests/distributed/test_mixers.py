"""Recurrent layers over ranks against transformers' own module, document by document, and what each rank computes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.support.ranks import RankPool
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from farspan.models.checkpoint import make_config
from farspan.models.mixers import WHOLE_KEYWORD, MixerFacts, hook_mixers, mixer_facts, recurrence_of, recurrent_mixers
from farspan.parallel.exchange import Exchange
from farspan.parallel.layout import make_layout
from farspan.parallel.whole import WholeSequence
from farspan.verify.reference import gradient_error

# Documents of one token, shorter than the convolution, longer than a chunk of the recurrence, off every shard's edge.
BOUNDS = (0, 1, 4, 90, 160)
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}
DELTA = {**SMALL, "linear_value_head_dim": 8, "linear_key_head_dim": 4, "intermediate_size": 48,
         "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
SPACE = {**SMALL, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16,
         "intermediate_size": 48}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "fused projections": (
        "qwen3_next",
        {**DELTA, **EXPERTS, "head_dim": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 8},
    ),
    "split projections": (
        "qwen3_5_text",
        {**DELTA, "head_dim": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 4},
    ),
    "projections apart": ("olmo_hybrid", {**DELTA, "linear_num_key_heads": 4, "linear_num_value_heads": 4}),
    "one group": ("bamba", {**SPACE, "mamba_n_groups": 1, "attn_layer_indices": [1]}),
    "a group each": ("bamba", {**SPACE, "mamba_n_groups": 4, "attn_layer_indices": [1]}),
    "three key heads": (
        "qwen3_5_text",
        {**DELTA, "head_dim": 8, "linear_num_key_heads": 3, "linear_num_value_heads": 6},
    ),
}


@dataclass(frozen=True)
class Found:
    """One rank's: the layer's result in global order, gradients summed over ranks, bytes sent, products computed."""

    out_TE: Tensor
    gradients: dict[str, Tensor]
    bytes_sent: int
    flops: int
    facts: MixerFacts


def make_mixer(name: str, unknown: bool) -> tuple[nn.Module, MixerFacts, Tensor]:
    architecture, settings = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(architecture, settings)).double().eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.5)
    mixer = recurrent_mixers(model)[0]
    if unknown:
        mixer.register_parameter("something_new", nn.Parameter(torch.zeros(1, dtype=torch.float64)))
    hook_mixers(model)
    hidden_TE = torch.randn(BOUNDS[-1], 32, dtype=torch.float64)
    return mixer, mixer_facts(model)[0], hidden_TE


def run_mixer(name: str, layout_name: str, unknown: bool) -> Found:
    mixer, facts, hidden_TE = make_mixer(name, unknown)
    exchange = Exchange(dist.group.WORLD)
    layout = make_layout(layout_name, BOUNDS[-1], exchange.num_ranks, BOUNDS)
    hidden_tE = layout.take(hidden_TE, exchange.rank).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = mixer(hidden_states=hidden_tE.unsqueeze(0), **{WHOLE_KEYWORD: WholeSequence(BOUNDS, exchange, layout)})
    out[0].sin().sum().backward()
    gradients = {n: p.grad.clone() for n, p in mixer.named_parameters() if p.grad is not None}
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    assert hidden_tE.grad is not None
    parts = [[torch.empty_like(x) for _ in range(exchange.num_ranks)] for x in (out[0], hidden_tE)]
    dist.all_gather(parts[0], out[0].detach().contiguous())
    dist.all_gather(parts[1], hidden_tE.grad)
    gradients["input"] = layout.join(parts[1])
    return Found(layout.join(parts[0]), gradients, exchange.bytes_sent, counter.get_total_flops(), facts)


def own_mixer(name: str) -> Found:
    """transformers' own module on every document."""
    mixer, facts, hidden_TE = make_mixer(name, unknown=False)
    hidden_TE.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        documents = [mixer(hidden_states=hidden_TE[a:b].unsqueeze(0))[0] for a, b in pairwise(BOUNDS)]
    out_TE = torch.cat(documents)
    out_TE.sin().sum().backward()
    gradients = {n: p.grad for n, p in mixer.named_parameters() if p.grad is not None}
    assert hidden_TE.grad is not None
    return Found(out_TE.detach(), {**gradients, "input": hidden_TE.grad}, 0, counter.get_total_flops(), facts)


def assert_equal(found: Found, own: Found) -> None:
    # The recurrences of transformers compute in fp32 whatever their type.
    torch.testing.assert_close(found.out_TE, own.out_TE, rtol=1e-5, atol=1e-6)
    assert found.gradients.keys() == own.gradients.keys()
    error, worst = gradient_error(found.gradients, own.gradients)
    assert error < 1e-5, worst


KNOWN = [name for name in MODELS if name != "three key heads"]


@pytest.mark.parametrize(("num_ranks", "layout"), [(2, "contiguous"), (4, "document_zigzag")])
@pytest.mark.parametrize("name", KNOWN)
def test_a_switched_layer_equals_its_module_and_each_rank_computes_its_share_of_it(
    ranks: RankPool, name: str, num_ranks: int, layout: str
) -> None:
    own = own_mixer(name)
    for found in ranks.run(run_mixer, num_ranks, name, layout, False):
        assert_equal(found, own)
        assert found.facts.units is not None
        assert found.bytes_sent == 2 * found.facts.bytes_sent(BOUNDS[-1] // num_ranks, 8, num_ranks)
        if name != "one group":
            assert found.flops * num_ranks == own.flops
        else:
            # Every rank convolves the B and C that all heads read; all else is shared out.
            assert own.flops < found.flops * num_ranks < 1.2 * own.flops


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_heads_that_do_not_divide_are_padded_and_change_nothing(ranks: RankPool, num_ranks: int) -> None:
    own = own_mixer("three key heads")
    for found in ranks.run(run_mixer, num_ranks, "three key heads", "zigzag", False):
        assert_equal(found, own)
        assert found.bytes_sent == 2 * found.facts.bytes_sent(BOUNDS[-1] // num_ranks, 8, num_ranks)


def test_a_layer_of_unknown_inside_is_gathered_and_every_rank_computes_all_of_it(ranks: RankPool) -> None:
    own = own_mixer("split projections")
    for found in ranks.run(run_mixer, 2, "split projections", "zigzag", True):
        assert_equal(found, own)
        assert found.facts.units is None
        assert found.bytes_sent == 2 * found.facts.bytes_sent(BOUNDS[-1] // 2, 8, 2)
        assert found.flops == own.flops


def test_a_module_is_known_by_its_parts_and_never_changed() -> None:
    mixer, _, hidden_TE = make_mixer("fused projections", unknown=False)
    before = dict(vars(mixer))
    mixer(hidden_states=hidden_TE.unsqueeze(0), **{WHOLE_KEYWORD: WholeSequence(BOUNDS)})
    assert vars(mixer) == before
    assert recurrence_of(mixer) is not None
    assert recurrence_of(nn.Linear(2, 2)) is None
