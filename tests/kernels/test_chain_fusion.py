"""Which steps of a chain become one kernel on a GPU: as few as a decoder layer needs, and never a step too many."""

from dataclasses import replace

import pytest
from tests.support.chains import draw

from farspan.kernels.chain.contract import Activation, Add, Gate, Multiply, Normalize, Rotate, reads, widths_of
from farspan.kernels.chain.fusion import Gated, Products, Sum, Turn, fuse, inputs_of
from farspan.kernels.rms_norm.contract import Kind

WIDTH, DIM, INNER = 32, 8, 48
BEFORE = {"x": WIDTH, "cos": DIM, "sin": DIM}
AFTER = {"a": WIDTH, "x": WIDTH}


def norm(x: str, y: str, width: int = WIDTH, eps: float = 1e-6) -> Normalize:
    return Normalize(x, y, draw(width), eps, Kind.SCALED)


def before(*, normed: bool = False, eps: float = 1e-6):
    """Of a layer of Llama, or of Qwen3, up to attention."""
    heads = [Multiply("n", name, draw(size, WIDTH)) for name, size in (("q", 4 * DIM), ("k", 2 * DIM), ("v", 2 * DIM))]
    steps = [norm("x", "n"), *heads]
    for name in ("q", "k"):
        steps += [norm(name, f"{name}n", DIM, eps if name == "k" else 1e-6)] * normed
        steps.append(Rotate(f"{name}n" if normed else name, "cos", "sin", f"{name}t", DIM))
    return steps


def after(*, both_sides: bool = False):
    """Of a layer of Llama, or of Gemma 2, from attention on."""
    o, d = ("on", "dn") if both_sides else ("o", "d")
    return [
        Multiply("a", "o", draw(WIDTH, WIDTH)),
        *[norm("o", "on")] * both_sides,
        Add("x", o, "m"),
        norm("m", "mn"),
        Multiply("mn", "gate", draw(INNER, WIDTH)),
        Multiply("mn", "up", draw(INNER, WIDTH, seed=1)),
        Gate("gate", "up", "inner", Activation.SILU),
        Multiply("inner", "d", draw(WIDTH, INNER)),
        *[norm("d", "dn")] * both_sides,
        Add("m", d, "y"),
    ]


def kinds(steps, given, wanted):
    return [type(each) for each in fuse(steps, widths_of(steps, given), wanted)]


def test_a_layer_of_llama_is_seven_kernels_beside_attention() -> None:
    assert kinds(before(), BEFORE, ["qt", "kt", "v"]) == [Sum, Products, Turn]
    assert kinds(after(), AFTER, ["y"]) == [Products, Sum, Products, Products]


def test_normalizations_of_heads_and_behind_a_linear_layer_cost_no_kernel_of_their_own() -> None:
    assert kinds(before(normed=True), BEFORE, ["qt", "kt", "v"]) == [Sum, Products, Turn]
    # The last sum goes with the normalization before it, not with the linear layer before that.
    assert kinds(after(both_sides=True), AFTER, ["y"]) == [Products, Sum, Products, Products, Sum]


@pytest.mark.parametrize(
    ("steps", "given", "wanted"),
    [
        (before(), BEFORE, ["qt", "kt", "v"]),
        (before(normed=True), BEFORE, ["qt", "kt", "v", "qn"]),
        (after(), AFTER, ["y", "gate", "m"]),
        (after(both_sides=True), AFTER, ["y"]),
    ],
)
def test_every_step_is_there_once_and_after_what_it_reads(steps, given, wanted) -> None:
    fused, there, done = fuse(steps, widths_of(steps, given), wanted), set(given), []
    for each in fused:
        assert set(inputs_of(each)) <= there
        for step in each.steps:
            assert set(reads(step)) <= there
            there.add(step.y)
            done.append(step.y)
    assert done == [step.y for step in steps]


def test_rows_that_somebody_else_needs_are_made_by_themselves() -> None:
    assert kinds(before(normed=True), BEFORE, ["qt", "kt", "v", "qn"]) == [Sum, Products, Sum, Turn, Turn]
    assert kinds(after(), AFTER, ["y", "gate"]) == [Products, Sum, Products, Gated, Products]
    assert kinds(after(), AFTER, ["y", "d"]) == [Products, Sum, Products, Products, Sum]


def test_what_one_kernel_cannot_do_stays_apart() -> None:
    # Each with an eps of its own.
    assert kinds(before(normed=True, eps=1e-5), BEFORE, ["qt", "kt", "v"]) == [Sum, Products, Turn, Turn]
    biased = [
        replace(step, b_N=draw(INNER)) if isinstance(step, Multiply) and step.y == "up" else step for step in after()
    ]
    assert kinds(biased, AFTER, ["y"]) == [Products, Sum, Products, Gated, Products]
    # A normalization of heads is not one of the row.
    heads = [Add("a", "b", "s"), norm("s", "y", DIM)]
    assert kinds(heads, {"a": WIDTH, "b": WIDTH}, ["y"]) == [Sum, Sum]
    # A sum of a row with itself has no other row.
    twice = [norm("a", "n"), Add("n", "n", "y")]
    assert kinds(twice, {"a": WIDTH}, ["y"]) == [Sum, Sum]
