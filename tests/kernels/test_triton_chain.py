"""A chain of steps in Triton equals its steps one by one in torch: compiled on a GPU, interpreted elsewhere.

The interpreter cuts bf16 numbers off where a GPU rounds them; fp16 stands for bf16 there.
"""

import os

import pytest
import torch
from tests.support.chains import GIVEN, WANTED, WIDTH, block, draw, laid_together, rows, with_weights

from farspan.kernels.chain.contract import Activation, Add, Gate, Multiply, Normalize, Rotate
from farspan.kernels.chain.reference import bind_chain_reference
from farspan.kernels.chain.triton import bind_chain_triton
from farspan.kernels.chain.triton_linear import MOST_ROWS
from farspan.kernels.rms_norm.contract import Kind

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = [pytest.param("cpu")] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
HALF = torch.float16 if INTERPRETED else torch.bfloat16
EPS = torch.finfo(HALF).eps
KINDS = [(Kind.SCALED, Activation.SILU), (Kind.ONE_MORE, Activation.GELU_TANH)]


@pytest.fixture(autouse=True)
def _poisoned():
    """torch.empty is full of NaN: what a kernel does not write, a test sees."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def all_of(steps, given, wanted, inputs, device):
    """What Triton gives, what torch gives, and the truth."""
    steps, inputs = with_weights(steps, HALF), [x.to(HALF) for x in inputs]
    chain = bind_chain_triton(with_weights(steps, device), given, wanted, HALF)
    got = [x.cpu() for x in chain(*(x.to(device) for x in inputs))]
    want = bind_chain_reference(steps, given, wanted)(*inputs)
    truth = bind_chain_reference(with_weights(steps, torch.float64), given, wanted)(*(x.double() for x in inputs))
    return zip(got, want, truth, strict=True)


def near(got, want):
    """But for roundings elsewhere."""
    return float((got.double() - want.double()).norm()) <= 1e-2 * float(want.double().norm())


@pytest.mark.parametrize("count", [0, 1, MOST_ROWS, MOST_ROWS + 1, 5, 33])
@pytest.mark.parametrize(("kind", "activation"), KINDS)
@pytest.mark.parametrize("device", DEVICE)
def test_a_whole_block_in_few_kernels_is_as_exact_as_its_steps_in_torch(device, kind, activation, count) -> None:
    for ours, torchs, truth in all_of(block(kind, activation), GIVEN, WANTED, rows(count), device):
        assert ours.shape == torchs.shape
        assert ours.dtype == HALF
        # A row of 51 numbers: where one is rounded to the other side, all that follow are.
        assert float((ours.double() - truth).norm()) <= 1.5 * float((torchs.double() - truth).norm())


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("device", DEVICE)
def test_weights_in_one_piece_give_what_weights_apart_give(device, biased, count) -> None:
    names = {"q": 48, "k": 16, "v": 16}
    steps = [
        *(Multiply("x", name, draw(size, WIDTH), draw(size) if biased else None) for name, size in names.items()),
        Multiply("q", "gate", draw(40, 48)),
        Multiply("q", "up", draw(40, 48, seed=1)),
        Gate("gate", "up", "y", Activation.GELU_TANH),
    ]
    wanted, x = ["k", "v", "y"], draw(count, WIDTH).to(device, HALF)
    steps = with_weights(with_weights(steps, HALF), device)
    apart, together = (bind_chain_triton(each, {"x": WIDTH}, wanted, HALF)(x) for each in (steps, laid_together(steps)))
    for a, b in zip(apart, together, strict=True):
        assert near(a, b)
    # On few rows it is the same kernel.
    assert count > MOST_ROWS or all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


STEPS = {
    "multiplied": Multiply("x", "y", draw(40, 48), draw(40)),
    "normalized": Normalize("x", "y", draw(16), 1e-6, Kind.SCALED),
    "one more": Normalize("x", "y", draw(48), 1e-6, Kind.ONE_MORE),
    "silu": Gate("x", "z", "y", Activation.SILU),
    "gelu": Gate("x", "z", "y", Activation.GELU_TANH),
    "added": Add("x", "z", "y"),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=list(STEPS))
@pytest.mark.parametrize("device", DEVICE)
def test_each_step_is_two_roundings_from_the_truth(device, step) -> None:
    given = (draw(11, 48) * torch.logspace(-2, 1.5, 11)[:, None].bfloat16(), draw(11, 48, seed=1))
    ((got, want, truth),) = all_of([step], {"x": 48, "z": 48}, ["y"], given, device)
    torch.testing.assert_close(got.float(), want.float(), rtol=2 * EPS, atol=8 * EPS)
    if not isinstance(step, Multiply):
        # Where the truth itself is a small sum of large parts.
        smallest = max(torch.finfo(HALF).tiny, 1e-13)
        assert bool(((got.double() - truth).abs() <= EPS * truth.abs() + smallest).all())


@pytest.mark.parametrize(("heads", "others", "dim", "turned"), [(3, 1, 16, 16), (5, 2, 20, 12), (1, 0, 64, 64)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("device", DEVICE)
def test_one_or_two_rows_of_heads_turn_whole_or_in_part_normalized_or_not(
    device, kind, normed, heads, others, dim, turned
) -> None:
    steps, given, wanted = [], {"cos": turned, "sin": turned}, []
    for number, (name, count) in enumerate((("q", heads), ("k", others))[: 1 + bool(others)]):
        given[name] = count * dim
        if normed:
            steps.append(Normalize(name, f"{name}n", draw(dim, seed=number), 1e-5, kind))
        steps.append(Rotate(f"{name}n" if normed else name, "cos", "sin", f"{name}t", dim))
        wanted.append(f"{name}t")
    angles = draw(7, turned // 2, seed=7).float().repeat(1, 2)
    inputs = [angles.cos(), angles.sin(), *(draw(7, given[name]) for name in list(given)[2:])]
    for got, want, truth in all_of(steps, given, wanted, inputs, device):
        if not normed:
            assert torch.equal(got, want)
        assert float((got.double() - truth).norm()) <= 1.2 * float((want.double() - truth).norm())


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("device", DEVICE)
def test_a_sum_is_rounded_before_it_is_normalized_and_what_is_added_before_it_is_added(
    device, kind, before, after
) -> None:
    steps = [Normalize("o", "on", draw(96), 1e-6, kind)] * before + [Add("x", "on" if before else "o", "m")]
    steps += [Normalize("m", "mn", draw(96, seed=1), 1e-6, kind)] * after
    given = (draw(5, 96) * torch.logspace(-2, 1, 5)[:, None].bfloat16(), draw(5, 96, seed=2))
    wanted = ["m", "mn"] if after else ["m"]
    for got, want, _ in all_of(steps, {"o": 96, "x": 96}, wanted, given, device):
        # Sums of squares in another order: a rounding elsewhere for a number in a hundred.
        torch.testing.assert_close(got.float(), want.float(), rtol=2 * EPS, atol=1e-6)
        assert float((got != want).double().mean()) <= 0.02


@pytest.mark.parametrize("device", DEVICE)
def test_rows_that_lie_apart_and_numbers_that_are_none_stay_by_themselves(device) -> None:
    steps = with_weights(with_weights(block(Kind.SCALED, Activation.SILU), HALF), device)
    chain, given = bind_chain_triton(steps, GIVEN, WANTED, HALF), [x.to(device, HALF) for x in rows(6)]
    spread = [torch.full((12, 64), float("nan")).to(device, HALF)[::2, : x.shape[1]] for x in given]
    for whole, x in zip(spread, given, strict=True):
        whole.copy_(x)
    for got, want in zip(chain(*spread), chain(*given), strict=True):
        assert near(got, want)
    for few in (given, [x[:3] for x in given]):
        few[0][1, 7] = float("nan")
        for got in chain(*few):
            assert got[1].isnan().any()
            assert got[[0, 2]].isfinite().all()
