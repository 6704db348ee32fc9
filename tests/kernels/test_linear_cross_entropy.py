"""The fused head and loss against torch's cross entropy over all logits, and against DeepSpeed's fused loss."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.live import LiveBytes
from tests.support.relative import relative_error
from torch.utils.flop_counter import FlopCounterMode

from farspan.kernels.linear_cross_entropy.contract import HeadRule
from farspan.kernels.linear_cross_entropy.op import linear_cross_entropy
from farspan.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference

NUM_TOKENS, WIDTH, VOCAB = 23, 8, 29
IGNORED = -100
RULES = {
    "plain": HeadRule(),
    "soft cap": HeadRule(softcap=1.5),
    "logit scale": HeadRule(factor=0.25),
    "label smoothing": HeadRule(label_smoothing=0.1),
    "z-loss": HeadRule(z_loss=1e-2),
    "everything": HeadRule(factor=3.0, softcap=2.0, label_smoothing=0.2, z_loss=1e-2),
}
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(dtype: torch.dtype = torch.float64) -> Inputs:
    """(hidden_TE, weight_VE, bias_V, labels_T) with a whole tile of 5 and some single tokens ignored."""
    generator = torch.Generator().manual_seed(7)
    hidden_TE = torch.randn(NUM_TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    weight_VE = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    bias_V = torch.randn(VOCAB, generator=generator, dtype=torch.float64).to(dtype)
    labels_T = torch.randint(VOCAB, (NUM_TOKENS,), generator=generator)
    labels_T[5:10] = IGNORED
    labels_T[[0, 13]] = IGNORED
    return hidden_TE.requires_grad_(), weight_VE.requires_grad_(), bias_V.requires_grad_(), labels_T


def gradients(loss: torch.Tensor, tensors: Inputs) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, tensors[:3]))


@pytest.mark.parametrize("tile_tokens", [1, 5, 100])
@pytest.mark.parametrize("scale", [1.0, 1 / 8, 7.0])
@pytest.mark.parametrize("name", RULES)
def test_loss_and_every_gradient_equal_the_reference_at_any_scale_of_the_loss(
    name: str, scale: float, tile_tokens: int
) -> None:
    hidden_TE, weight_VE, bias_V, labels_T = tensors = inputs()
    want_T = linear_cross_entropy_reference(hidden_TE, weight_VE, bias_V, labels_T, RULES[name])
    got_T = linear_cross_entropy(
        hidden_TE, weight_VE, labels_T, bias_V=bias_V, rule=RULES[name], tile_tokens=tile_tokens
    )
    assert relative_error(got_T, want_T) < 1e-12
    want, got = gradients(scale * want_T.sum(), tensors), gradients(scale * got_T.sum(), tensors)
    assert all(relative_error(g, w) < 1e-12 for g, w in zip(got, want, strict=True))


def test_a_weight_for_every_token_equals_the_reference() -> None:
    hidden_TE, weight_VE, bias_V, labels_T = tensors = inputs()
    weights_T = torch.linspace(-1.0, 2.0, NUM_TOKENS, dtype=torch.float64)
    want_T = linear_cross_entropy_reference(hidden_TE, weight_VE, bias_V, labels_T, HeadRule())
    got_T = linear_cross_entropy(hidden_TE, weight_VE, labels_T, bias_V=bias_V, tile_tokens=4)
    want, got = gradients((weights_T * want_T).sum(), tensors), gradients((weights_T * got_T).sum(), tensors)
    assert all(relative_error(g, w) < 1e-12 for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_gradients_equal_finite_differences(name: str) -> None:
    hidden_TE, weight_VE, bias_V, labels_T = inputs()

    def loss_T(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, labels_T, bias_V=bias, rule=RULES[name], tile_tokens=6)

    assert torch.autograd.gradcheck(loss_T, (hidden_TE, weight_VE, bias_V))


def test_tiles_without_labels_give_zeros_even_where_hidden_states_are_not_finite() -> None:
    hidden_TE, weight_VE, bias_V, labels_T = inputs()
    with torch.no_grad():
        hidden_TE[labels_T == IGNORED] = torch.inf
    loss_T = linear_cross_entropy(hidden_TE, weight_VE, labels_T, bias_V=bias_V, tile_tokens=3)
    found = gradients(loss_T.sum(), (hidden_TE, weight_VE, bias_V, labels_T))
    assert bool(loss_T.isfinite().all())
    assert bool((loss_T[labels_T == IGNORED] == 0).all())
    assert bool((found[0][labels_T == IGNORED] == 0).all())
    none_T = torch.full_like(labels_T, IGNORED)
    loss_T = linear_cross_entropy(hidden_TE, weight_VE, none_T, bias_V=bias_V, tile_tokens=5)
    assert all(bool((g == 0).all()) for g in gradients(loss_T.sum(), (hidden_TE, weight_VE, bias_V, none_T)))


def test_a_frozen_head_gets_no_gradient_and_hidden_states_theirs() -> None:
    hidden_TE, weight_VE, bias_V, labels_T = inputs()
    want = gradients(
        linear_cross_entropy(hidden_TE, weight_VE, labels_T, bias_V=bias_V, tile_tokens=5).sum(),
        (hidden_TE, weight_VE, bias_V, labels_T),
    )[0]
    frozen = weight_VE.detach(), bias_V.detach()
    linear_cross_entropy(hidden_TE, frozen[0], labels_T, bias_V=frozen[1], tile_tokens=5).sum().backward()
    assert hidden_TE.grad is not None
    assert torch.equal(hidden_TE.grad, want)
    assert frozen[0].grad is None


def test_in_half_precision_the_head_gradient_of_many_tiles_is_as_good_as_of_one() -> None:
    exact = inputs()
    want = gradients(linear_cross_entropy_reference(exact[0], exact[1], exact[2], exact[3], HeadRule()).sum(), exact)
    errors = []
    for tile_tokens in (1, NUM_TOKENS):
        half = inputs(torch.bfloat16)
        loss_T = linear_cross_entropy(half[0], half[1], half[3], bias_V=half[2], tile_tokens=tile_tokens)
        assert loss_T.dtype == torch.float32
        errors.append(relative_error(gradients(loss_T.sum(), half)[1], want[1]))
    assert errors[0] < 1.1 * errors[1] + 1e-4
    assert errors[1] < 2e-2


def test_backward_computes_the_logits_of_all_tiles_but_the_last_again_and_a_second_backward_gives_the_same() -> None:
    hidden_TE, weight_VE, _, labels_T = inputs()
    loss = linear_cross_entropy(hidden_TE, weight_VE, labels_T, tile_tokens=5).sum()
    counted = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            found = torch.autograd.grad(loss, (hidden_TE, weight_VE), retain_graph=True)
        counted.append((counter.get_total_flops(), found))
    assert counted[1][0] - counted[0][0] == 2 * weight_VE.numel() * (NUM_TOKENS % 5)
    assert all(torch.equal(a, b) for a, b in zip(counted[0][1], counted[1][1], strict=True))


def test_the_logits_of_all_tokens_never_exist_at_once() -> None:
    num_tokens, vocab, width, tile_tokens = 4096, 8192, 16, 64
    hidden_TE = torch.randn(num_tokens, width, requires_grad=True)
    weight_VE = torch.randn(vocab, width, requires_grad=True)
    labels_T = torch.arange(num_tokens) % vocab

    def step() -> None:
        linear_cross_entropy(hidden_TE, weight_VE, labels_T, tile_tokens=tile_tokens).sum().backward()

    step()
    with LiveBytes() as live:
        step()
    assert live.peak < num_tokens * vocab * 4 / 4


@pytest.mark.gpu
def test_on_a_gpu_half_precision_gradients_are_as_good_as_those_of_all_logits_at_once() -> None:
    num_tokens, vocab, width = 300, 40_000, 128
    generator = torch.Generator().manual_seed(0)
    hidden_TE, weight_VE = (
        torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (num_tokens, vocab)
    )
    labels_T = torch.randint(vocab, (num_tokens,), generator=generator)

    def found(dtype: torch.dtype, tile_tokens: int | None) -> list[torch.Tensor]:
        x_TE, w_VE = (x.to("cuda", dtype).requires_grad_() for x in (hidden_TE, weight_VE))
        if tile_tokens is None:
            loss_T = linear_cross_entropy_reference(x_TE, w_VE, None, labels_T.cuda(), HeadRule())
        else:
            loss_T = linear_cross_entropy(x_TE, w_VE, labels_T.cuda(), tile_tokens=tile_tokens)
        return [g.cpu() for g in torch.autograd.grad(loss_T.sum() / num_tokens, (x_TE, w_VE))]

    want = found(torch.float64, None)
    peers, ours = found(torch.bfloat16, None), found(torch.bfloat16, 64)
    for exact, peer, own in zip(want, peers, ours, strict=True):
        assert relative_error(own, exact) < 1.2 * relative_error(peer, exact) + 1e-3


def by_deepspeed(hidden_TE: torch.Tensor, weight_VE: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    """The summed loss of the same head by DeepSpeed's fused loss, four tiles."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    head = torch.nn.Linear(WIDTH, VOCAB, bias=False, dtype=torch.float64)
    head.weight = torch.nn.Parameter(weight_VE.detach().clone())

    def loss(module: torch.nn.Linear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(module(x).view(-1, VOCAB), y.view(-1), reduction="sum")

    shard = hidden_TE.detach().unsqueeze(0).requires_grad_()
    total = TiledFusedLogitsLoss.apply(loss, head, shard, labels_T.unsqueeze(0), None, 4, [head.weight], "sum")
    (total / 8).backward()
    assert head.weight.grad is not None
    return head.weight.grad


def test_a_loss_divided_by_8_has_a_head_gradient_divided_by_8_where_deepspeeds_is_8_times_too_large() -> None:
    hidden_TE, weight_VE, _, labels_T = inputs()
    loss_T = linear_cross_entropy_reference(hidden_TE, weight_VE, None, labels_T, HeadRule())
    want = torch.autograd.grad(loss_T.sum() / 8, weight_VE)[0]
    loss_T = linear_cross_entropy(hidden_TE, weight_VE, labels_T, tile_tokens=6)
    ours = torch.autograd.grad(loss_T.sum() / 8, weight_VE)[0]
    assert relative_error(ours, want) < 1e-12
    ratio = (by_deepspeed(hidden_TE, weight_VE, labels_T).norm() / want.norm()).item()
    # A peer that mends this makes the test fail here, and this sentence is then to be taken out.
    assert math.isclose(ratio, 8.0, rel_tol=1e-9)
