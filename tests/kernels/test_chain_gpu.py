"""A chain of steps on a real GPU, in the sizes of a Llama of 8 billion weights: few rows, many, and captured graphs."""

from functools import partial

import pytest
import torch
from tests.support.chains import laid_together

from farspan.kernels.chain.contract import Activation, Add, Gate, Multiply, Normalize, Rotate
from farspan.kernels.chain.dispatch import choose_chain
from farspan.kernels.chain.reference import bind_chain_reference
from farspan.kernels.chain.triton import bind_chain_triton
from farspan.kernels.early import early_on
from farspan.kernels.paged_decode.triton import attend_pages_triton
from farspan.kernels.paged_decode.triton_write import write_pages_triton
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


LAYERS, REPEATS, PAST, SLOTS = 4, 200, 500, 16


@pytest.fixture
def _early():
    if not early_on(torch.device("cuda"))["PDL"]:
        pytest.skip("kernels are launched early from compute capability 9.0 on")


def captured(run):
    """The graph, and what it writes to."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    return graph, got


class Layer:
    """A decoder layer over pages of its own; the new token of each row goes where its page begins."""

    def __init__(self, steps, count, early):
        self.count, self.early = count, early
        before, after = steps
        self.before = bind_chain_triton(before, BEFORE, HEADS_OF, early=early)
        self.after = bind_chain_triton(after, AFTER, ["y"], early=early)
        pages = PAST // SLOTS + 1
        self.keys, self.values = draw(2, count * pages, SLOTS, GROUPS, DIM)
        self.tables = torch.arange(count * pages, device="cuda", dtype=torch.int32).view(count, pages)
        self.lengths = torch.full((count,), PAST, device="cuda", dtype=torch.int32)
        self.pages = self.tables[:, (PAST - 1) // SLOTS].long()
        self.slots = torch.full_like(self.pages, (PAST - 1) % SLOTS)

    def __call__(self, x, cos, sin):
        q, k, v = self.before(x, cos, sin)
        new = (rows.view(self.count, GROUPS, DIM) for rows in (k, v))
        write_pages_triton(self.keys, self.values, *new, self.pages, self.slots, self.early)
        pages = self.keys, self.values, self.tables, self.lengths
        out, _ = attend_pages_triton(q.view(self.count, 1, HEADS, DIM), *pages, scale=DIM**-0.5, early=self.early)
        return self.after(out.view(self.count, WIDTH), x)[0]


def through(layers, x, cos, sin):
    for layer in layers:
        x = layer(x, cos, sin)
    return x


@pytest.mark.usefixtures("_early")
@pytest.mark.parametrize("count", [1, 2, 8, 64])
def test_layers_launched_early_give_the_bits_of_layers_launched_one_after_another_in_200_graphs(count) -> None:
    steps = [(before(), after()) for _ in range(LAYERS)]
    inputs = rows_before(count)
    # Kept: their pages are not the graphs'.
    stacks = [[Layer(each, count, early) for each in steps] for early in (True, False)]
    early, apart = (captured(partial(through, layers, *inputs)) for layers in stacks)
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    seen = []
    for x in draw(REPEATS, count, WIDTH):
        inputs[0].copy_(x)
        for graph, got in (early, apart):
            got.fill_(torch.nan)
            graph.replay()
        # Not equal: a NaN is a difference.
        differ += ~(early[1] == apart[1]).all()
        seen.append(early[1][0, 0].clone())
    assert int(differ) == 0
    assert len(set(torch.stack(seen).tolist())) > REPEATS // 4


@pytest.mark.usefixtures("_early")
@pytest.mark.parametrize("between", [False, True], ids=["right before", "one kernel before"])
@pytest.mark.parametrize("count", [1, 2])
def test_weights_that_are_written_just_before_are_read_as_they_were_written(count, between) -> None:
    w, fresh, x = weights(HEADS * DIM, WIDTH), weights(HEADS * DIM, WIDTH), draw(count, WIDTH)
    norm = Normalize("x", "n", draw(WIDTH), 1e-5, Kind.SCALED)
    steps = [norm, Multiply("n", "y", w)] if between else [Multiply("x", "y", w)]

    def run(chain):
        w.copy_(fresh)
        return chain(x)[0]

    chains = [bind_chain_triton(steps, {"x": WIDTH}, ["y"], early=early) for early in (True, False)]
    early, apart = (captured(partial(run, chain)) for chain in chains)
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for number in range(REPEATS):
        # Old weights are of another sign, which no rounding hides.
        fresh.neg_().add_(0.01 * (number % 7 - 3))
        for graph, _ in (early, apart):
            w.fill_(torch.nan)
            graph.replay()
        differ += ~(early[1] == apart[1]).all()
    assert int(differ) == 0
