"""A chain of steps in bf16 on a CPU by native.cpp, called through ctypes. Contract: contract.py.

A step alone is a few microseconds of work in decode, and a call costs more than that.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farspan.kernels.chain.contract import (
    Add,
    Chain,
    Gate,
    Multiply,
    Normalize,
    Rotate,
    Step,
    check_weights,
    reads,
    widths_of,
)
from farspan.kernels.rms_norm.contract import Kind
from farspan.kernels.team.calls import run_compiled
from farspan.kernels.team.native import load_library, load_team

_SOURCE = Path(__file__).with_name("native.cpp")
_MOST_BUFFERS, _MOST_STEPS = 40, 32
_KINDS = (None, Multiply, Normalize, Gate, Add, Rotate)
_BYTES = 2
# So many more than there are have room, at most: the kSide and kLeast of native.cpp.
_MORE_ROWS = 15
# The kLaidRows of linear.h.
_LAID_ROWS = 128
# Rows of a call: what lies between its steps stays small, and weights that are laid out serve many.
_MOST_ROWS = 1024


class _Step(ctypes.Structure):
    """Field for field the Step of native.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "level", "a", "b", "c", "y", "wide", "width", "size", "turned")),
        *((name, ctypes.c_int64) for name in ("form", "weight_row")),
        *((name, ctypes.c_void_p) for name in ("weights", "bias")),
        ("eps", ctypes.c_double),
    )


class _Run(ctypes.Structure):
    """Field for field the Run of native.cpp."""

    _fields_ = (
        ("at", ctypes.c_void_p * _MOST_BUFFERS),
        ("apart", ctypes.c_int64 * _MOST_BUFFERS),
        *((name, ctypes.c_void_p) for name in ("steps", "scratch", "team")),
        *((name, ctypes.c_int64) for name in ("num_steps", "num_buffers", "rows", "threads", "tiled", "own_bytes")),
    )


@cache
def load_native() -> _Bind:
    """The kernel, compiled now if this machine has not done it before. Raises ImportError where it cannot be made."""
    library, team = load_library(_SOURCE), load_team()
    library.farspan_chain.restype, library.farspan_chain.argtypes = None, [ctypes.c_void_p]
    library.farspan_wide_bytes.restype, library.farspan_wide_bytes.argtypes = ctypes.c_int64, [ctypes.c_int64]
    library.farspan_own_bytes.restype, library.farspan_own_bytes.argtypes = ctypes.c_int64, [ctypes.c_int64]
    library.farspan_has_tiles.restype, library.farspan_has_tiles.argtypes = ctypes.c_int64, []
    tiled = bool(library.farspan_has_tiles())
    return _Bind(library.farspan_chain, library.farspan_wide_bytes, library.farspan_own_bytes, team, tiled)


@dataclass(frozen=True, slots=True)
class _Spare:
    """Scratch of calls with many rows, kept for the next: memory that is new to a process costs more than the sums.

    Calls of few rows are made again from a recording, and their scratch is their own.
    """

    kept: list[Tensor] = field(default_factory=list)

    def take(self, size: int) -> Tensor:
        """Of at least `size` bytes, and nobody else's until it is put back."""
        # Two threads never pop the same one.
        with suppress(IndexError):
            if (scratch := self.kept.pop()).nbytes >= size:
                return scratch
        return torch.empty(size, dtype=torch.uint8)

    def put(self, scratch: Tensor) -> None:
        if not self.kept:
            self.kept.append(scratch)


@dataclass(frozen=True, slots=True)
class _Bind:
    """Makes chains. Contract: BindChain."""

    run: Any
    wide_bytes: Callable[[int], int]
    own_bytes: Callable[[int], int]
    """Of a thread, for a linear layer of so many inputs over many rows, by tiles."""
    team: int
    tiled: bool
    """Whether this processor multiplies by matrix tiles."""
    spare: _Spare = field(default_factory=_Spare)

    def __call__(self, steps: Sequence[Step], given: Mapping[str, int], wanted: Sequence[str]) -> Chain:
        return _bound(self, steps, given, wanted)


@dataclass(slots=True)
class _Plan:
    """Steps as numbers: where each reads and writes, and the level it belongs to."""

    widths: Mapping[str, int]
    wide_bytes: Callable[[int], int]
    places: dict[str, int] = field(default_factory=dict)
    """Buffers by name."""
    apart: list[int] = field(default_factory=list)
    """Bytes of a row of each buffer."""
    there: dict[str, int] = field(default_factory=dict)
    """From which level on rows can be read."""
    makers: dict[str, _Step] = field(default_factory=dict)
    """Steps that can widen what they make."""
    made: list[_Step] = field(default_factory=list)

    def place(self, name: str, row_bytes: int | None = None) -> int:
        if name not in self.places:
            self.places[name] = len(self.apart)
            self.apart.append(_BYTES * self.widths[name] if row_bytes is None else row_bytes)
        return self.places[name]

    def add(self, step: Step) -> None:
        needed = (self._widened(step.x),) if isinstance(step, Multiply) else reads(step)
        level = max(self.there[name] for name in needed)
        numbers = dict(zip("abc", (self.place(name) for name in needed), strict=False))
        width = self.widths[reads(step)[0]]
        made = _Step(kind=_KINDS.index(type(step)), level=level, y=self.place(step.y), wide=-1, width=width, **numbers)
        match step:
            case Multiply():
                made.size, made.weights, made.weight_row = len(step.w_NK), step.w_NK.data_ptr(), step.w_NK.stride(0)
                made.bias = None if step.b_N is None else step.b_N.data_ptr()
            case Normalize():
                made.size, made.weights, made.eps = len(step.w_D), step.w_D.data_ptr(), step.eps
                made.form = step.kind is Kind.ONE_MORE
            case Gate():
                made.form = step.activation
            case Rotate():
                made.size, made.turned = step.dim, self.widths[step.cos]
        self.there[step.y] = level + 1
        if not isinstance(step, Multiply):
            self.makers[step.y] = made
        self.made.append(made)

    def _widened(self, name: str) -> str:
        """Where the fp32 numbers of some rows are: whoever makes the rows leaves them there, or a step of its own."""
        wide = f"{name} in fp32"
        if wide not in self.places:
            place = self.place(wide, self.wide_bytes(self.widths[name]))
            if name in self.makers:
                self.makers[name].wide, self.there[wide] = place, self.there[name]
            else:
                self.made.append(_Step(level=self.there[name], a=self.place(name), wide=place, width=self.widths[name]))
                self.there[wide] = self.there[name] + 1
        return wide


def _bound(bind: _Bind, steps: Sequence[Step], given: Mapping[str, int], wanted: Sequence[str]) -> Chain:
    for step in steps:
        check_weights(step)
    widths = widths_of(steps, given)
    plan = _Plan(widths, bind.wide_bytes, there=dict.fromkeys(given, 0))
    inputs = [(plan.place(name), widths[name]) for name in given]
    for step in steps:
        plan.add(step)
    outputs = [(plan.place(name), widths[name]) for name in wanted]
    assert len(plan.apart) <= _MOST_BUFFERS, f"a chain has at most {_MOST_BUFFERS} buffers"
    assert len(plan.made) <= _MOST_STEPS, f"a chain has at most {_MOST_STEPS} steps"
    made = (_Step * len(plan.made))(*sorted(plan.made, key=lambda step: int(step.level)))
    # Filled in once: a decode step is many small calls, whose cost is what Python does around them.
    run = _Run(steps=ctypes.addressof(made), team=bind.team, num_steps=len(made), num_buffers=len(plan.apart))
    run.tiled = bind.tiled
    run.apart[: len(plan.apart)] = plan.apart
    outer = {place for place, _ in (*inputs, *outputs)}
    inner = [row for place, row in enumerate(plan.apart) if place not in outer]
    row_bytes, slack = sum(inner), 64 * len(inner)
    run.own_bytes = max((bind.own_bytes(step.w_NK.shape[1]) for step in steps if isinstance(step, Multiply)), default=0)

    def some_rows(rows: Sequence[Tensor], made_rows: Sequence[Tensor]) -> None:
        # Alive as long as the chain: steps and weights are known by their addresses.
        keeps = made, steps
        num_rows, call, threads = rows[0].shape[0], _Run.from_buffer_copy(run), torch.get_num_threads()
        at, apart = call.at, call.apart
        for x, (place, _) in zip((*rows, *made_rows), (*inputs, *outputs), strict=True):
            # A single row is as far from the next as it likes.
            at[place], apart[place] = x.data_ptr(), _BYTES * x.stride(0)
        many = bind.tiled and num_rows > _LAID_ROWS
        size = (num_rows + _MORE_ROWS) * row_bytes + slack + many * threads * run.own_bytes
        scratch = bind.spare.take(size) if many else torch.empty(size, dtype=torch.uint8)
        call.scratch, call.rows, call.threads = scratch.data_ptr(), num_rows, threads
        run_compiled(bind.run, call, scratch, *rows, *made_rows, keeps)
        if many:
            bind.spare.put(scratch)

    def chain_native(*rows: Tensor) -> tuple[Tensor, ...]:
        num_rows = rows[0].shape[0]
        for x, (_, width) in zip(rows, inputs, strict=True):
            assert x.shape == (num_rows, width), f"rows of {width} numbers"
            assert x.dtype == torch.bfloat16, f"not compiled for {x.dtype}"
            assert x.stride(1) == 1 or width == 1, "the numbers of a row lie side by side"
        made_rows = tuple([torch.empty((num_rows, width), dtype=torch.bfloat16) for _, width in outputs])
        if 0 < num_rows <= _MOST_ROWS:
            some_rows(rows, made_rows)
        else:
            for begin in range(0, num_rows, _MOST_ROWS):
                here = slice(begin, begin + _MOST_ROWS)
                some_rows([x[here] for x in rows], [y[here] for y in made_rows])
        return made_rows

    return chain_native
