"""A chain of steps on a real GPU, in the sizes of a Llama of 8 billion weights: few rows, many, and captured graphs."""

import pytest
import torch
from tests.support.chains import laid_together

from farspan.kernels.chain.contract import Activation, Add, Gate, Multiply, Normalize, Rotate
from farspan.kernels.chain.dispatch import choose_chain
from farspan.kernels.chain.reference import bind_chain_reference
from farspan.kernels.rms_norm.contract import Kind

pytestmark = pytest.mark.gpu
WIDTH, INNER, DIM, HEADS, GROUPS = 4096, 14336, 128, 32, 8
BEFORE, HEADS_OF = {"x": WIDTH, "cos": DIM, "sin": DIM}, ["qt", "kt", "v"]
AFTER = {"a": WIDTH, "x": WIDTH}
# Few rows have a kernel of their own.
COUNTS = [1, 2, 4, 5, 64, 3001]


def draw(*size, scale=1.0):
    generator = torch.Generator("cuda").manual_seed(sum(size))
    return (scale * torch.randn(size, generator=generator, device="cuda")).bfloat16()


def weights(outputs, inputs, seed=0):
    return draw(outputs, inputs + seed, scale=inputs**-0.5)[:, :inputs].contiguous()


def before():
    return laid_together(
        [
            Normalize("x", "n", draw(WIDTH), 1e-5, Kind.SCALED),
            Multiply("n", "q", weights(HEADS * DIM, WIDTH)),
            Multiply("n", "k", weights(GROUPS * DIM, WIDTH)),
            Multiply("n", "v", weights(GROUPS * DIM, WIDTH, seed=1)),
            Rotate("q", "cos", "sin", "qt", DIM),
            Rotate("k", "cos", "sin", "kt", DIM),
        ]
    )


def after():
    return laid_together(
        [
            Multiply("a", "o", weights(WIDTH, WIDTH)),
            Add("x", "o", "m"),
            Normalize("m", "mn", draw(WIDTH), 1e-5, Kind.SCALED),
            Multiply("mn", "gate", weights(INNER, WIDTH)),
            Multiply("mn", "up", weights(INNER, WIDTH, seed=1)),
            Gate("gate", "up", "inner", Activation.SILU),
            Multiply("inner", "d", weights(WIDTH, INNER)),
            Add("m", "d", "y"),
        ]
    )


def rows_before(count):
    angles = (
        37 * torch.arange(count, device="cuda")[:, None] * 1e4 ** -torch.linspace(0, 1, 64, device="cuda")
    ).repeat(1, 2)
    return draw(count, WIDTH), angles.cos().bfloat16(), angles.sin().bfloat16()


def rows_after(count):
    return draw(count, WIDTH), draw(count, WIDTH + 1)[:, :WIDTH]


PARTS = {"before": (before, rows_before, BEFORE, HEADS_OF), "after": (after, rows_after, AFTER, ["y"])}


def chain_of(part):
    make, rows, given, wanted = PARTS[part]
    bind = choose_chain("cuda", torch.bfloat16)
    assert bind is not None
    return bind(make(), given, wanted), rows


def double(steps):
    return [
        type(step)(
            *(x.double() if isinstance(x, torch.Tensor) else x for x in (getattr(step, n) for n in step.__slots__))
        )
        for step in steps
    ]


@pytest.mark.parametrize("part", list(PARTS))
def test_a_layer_of_8b_is_as_exact_as_its_steps_in_torch_for_one_row_and_for_thousands(part) -> None:
    make, rows, given, wanted = PARTS[part]
    steps, (chain, _) = make(), chain_of(part)
    truly = bind_chain_reference(double(steps), given, wanted)
    plainly = bind_chain_reference(steps, given, wanted)
    for count in COUNTS:
        inputs = rows(count)
        got, want, truth = chain(*inputs), plainly(*inputs), truly(*(x.double() for x in inputs))
        for ours, torchs, exact in zip(got, want, truth, strict=True):
            assert ours.shape == torchs.shape
            assert float((ours.double() - exact).norm()) <= 1.2 * float((torchs.double() - exact).norm()), count


@pytest.mark.parametrize("count", [1, 4, 64])
@pytest.mark.parametrize("part", list(PARTS))
def test_a_captured_graph_gives_for_other_rows_what_a_call_gives(part, count) -> None:
    chain, rows = chain_of(part)
    inputs = rows(count)
    others = [x.flip(-1).clone() for x in inputs]
    chain(*inputs)
    want = [x.clone() for x in chain(*others)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(*inputs)
    for here, new in zip(inputs, others, strict=True):
        here.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    for ours, called in zip(got, want, strict=True):
        assert float((ours.double() - called.double()).norm()) <= 1e-2 * float(called.double().norm())


@pytest.mark.parametrize("count", [1, 64, 900])
@pytest.mark.parametrize("part", list(PARTS))
def test_nothing_waits_for_the_device(part, count) -> None:
    chain, rows = chain_of(part)
    inputs = rows(count)
    chain(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        chain(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("count", [1, 64, 3001])
def test_rotation_gives_the_bits_that_torch_gives(count) -> None:
    _, cos, sin = rows_before(count)
    steps = [Rotate(name, "cos", "sin", f"{name}t", DIM) for name in "qk"]
    given = {"q": HEADS * DIM, "k": GROUPS * DIM, "cos": DIM, "sin": DIM}
    inputs = draw(count, HEADS * DIM), draw(count, GROUPS * DIM), cos, sin
    bind = choose_chain("cuda", torch.bfloat16)
    assert bind is not None
    for got, want in zip(
        *(make(steps, given, ["qt", "kt"])(*inputs) for make in (bind, bind_chain_reference)), strict=True
    ):
        assert torch.equal(got, want)
