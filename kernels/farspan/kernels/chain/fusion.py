"""Which steps of a chain become one kernel on a GPU: plain values, no kernel. Steps: contract.py.

What a kernel does beside the bytes it reads is the same few microseconds whatever it computes: in decode a layer is
as fast as it has few of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from farspan.kernels.chain.contract import Add, Gate, Multiply, Normalize, Rotate, Step, reads


@dataclass(frozen=True, slots=True)
class Products:
    """Linear layers over the same rows; then a gate over the two of them, or a sum with the one there is."""

    multiplies: tuple[Multiply, ...]
    gate: Gate | None = None
    add: Add | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        return (*self.multiplies, *(step for step in (self.gate, self.add) if step is not None))


@dataclass(frozen=True, slots=True)
class Sum:
    """A sum of two rows, one of them normalized before, the sum normalized after: each where it is not None."""

    before: Normalize | None = None
    add: Add | None = None
    after: Normalize | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(step for step in (self.before, self.add, self.after) if step is not None)


@dataclass(frozen=True, slots=True)
class Turn:
    """One or two rows of heads that turn by the same angles, all normalized before, or none."""

    turns: tuple[tuple[Normalize | None, Rotate], ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(step for turn in self.turns for step in turn if step is not None)


@dataclass(frozen=True, slots=True)
class Gated:
    """A gate whose rows something else makes."""

    gate: Gate

    @property
    def steps(self) -> tuple[Step, ...]:
        return (self.gate,)


Fused: TypeAlias = Products | Sum | Turn | Gated


def inputs_of(fused: Fused) -> tuple[str, ...]:
    """The rows that are read and not made inside."""
    made = {step.y for step in fused.steps}
    return tuple(dict.fromkeys(name for step in fused.steps for name in reads(step) if name not in made))


def fuse(steps: Sequence[Step], widths: Mapping[str, int], wanted: Iterable[str]) -> list[Fused]:
    """The steps in their order, as few as they can be. `widths` of all rows, as in `widths_of`."""
    uses = Counter(wanted)
    for step in steps:
        uses.update(reads(step))
    joins = _Joins(widths, uses)
    fused = [_alone(step) for step in steps]
    # A sum goes with the normalization after it before it goes with the linear layer that makes it.
    return _folded(_folded(fused, joins.rows), joins.products)


def _alone(step: Step) -> Fused:
    match step:
        case Multiply():
            return Products((step,))
        case Normalize():
            return Sum(after=step)
        case Add():
            return Sum(add=step)
        case Rotate():
            return Turn(((None, step),))
        case Gate():
            return Gated(step)


def _folded(fused: Sequence[Fused], join: Callable[[Fused, Fused], Fused | None]) -> list[Fused]:
    """Neighbours joined until none can be."""
    done: list[Fused] = []
    for each in fused:
        done.append(each)
        while len(done) > 1 and (joined := join(done[-2], done[-1])) is not None:
            done[-2:] = [joined]
    return done


@dataclass(frozen=True, slots=True)
class _Joins:
    """Two neighbours as one; None: they stay two."""

    widths: Mapping[str, int]
    uses: Mapping[str, int]

    def rows(self, first: Fused, then: Fused) -> Fused | None:
        match first, then:
            case Products(a, None, None), Products(b, None, None) if a[0].x == b[0].x:
                return Products((*a, *b))
            case Sum(None, None, Normalize() as norm), Sum(None, Add() as add, None):
                if self._passed_on(norm, (add.a, add.b)) and self._whole(norm):
                    return Sum(norm, add)
            case Sum(_, Add() as add, None), Sum(None, None, Normalize() as norm):
                if norm.x == add.y and self._whole(norm):
                    return replace(first, after=norm)
            case Sum(None, None, Normalize() as norm), Turn(((None, Rotate() as rotate),)):
                if self._passed_on(norm, (rotate.x,)) and len(norm.w_D) == rotate.dim:
                    return Turn(((norm, rotate),))
            case Turn((a_turn,)), Turn((b_turn,)):
                return Turn((a_turn, b_turn)) if _alike(a_turn, b_turn) else None
        return None

    def products(self, first: Fused, then: Fused) -> Fused | None:
        match first, then:
            case Products((a, b), None, None), Gated(gate):
                both = {gate.gate, gate.up} == {a.y, b.y} and a.w_NK.shape == b.w_NK.shape
                plain = a.b_N is None and b.b_N is None
                if both and plain and self.uses[a.y] == self.uses[b.y] == 1:
                    return Products((a, b), gate)
            case Products((a,), None, None), Sum(None, Add() as add, None) if self._passed_on(a, (add.a, add.b)):
                return Products((a,), None, add)
        return None

    def _passed_on(self, step: Step, needs: Sequence[str]) -> bool:
        """Whether what a step makes is needed there, once, and nowhere else."""
        return needs.count(step.y) == 1 and self.uses[step.y] == 1

    def _whole(self, norm: Normalize) -> bool:
        """One normalization a row, not one a head."""
        return self.widths[norm.x] == len(norm.w_D)


def _alike(a: tuple[Normalize | None, Rotate], b: tuple[Normalize | None, Rotate]) -> bool:
    (norm_a, turn_a), (norm_b, turn_b) = a, b
    if (turn_a.cos, turn_a.sin, turn_a.dim) != (turn_b.cos, turn_b.sin, turn_b.dim) or turn_b.x == turn_a.y:
        return False
    if norm_a is None or norm_b is None:
        return norm_a is norm_b
    return (norm_a.eps, norm_a.kind) == (norm_b.eps, norm_b.kind) and norm_b.x != turn_a.y
