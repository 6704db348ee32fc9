"""A chain of steps in bf16 on a GPU: linear layers by torch, or by Triton on a few rows; everything else by Triton.

Contract: contract.py; but how a sum is ordered depends on how many rows there are, as in torch. Linear layers over the
same rows whose weights lie one behind the other are one. Nothing waits for the GPU and every grid follows from shapes:
a chain can be captured in a CUDA graph, once it has been called with as many rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from farspan.kernels.chain.contract import Chain, Normalize, Step, check_weights, widths_of
from farspan.kernels.chain.fusion import Fused, Gated, Products, Sum, Turn, fuse, inputs_of
from farspan.kernels.chain.triton_linear import MOST_ROWS, multiply_few, multiply_gated_few
from farspan.kernels.chain.triton_rows import WIDEST_ROW, add_rows, gate_rows, normalize_rows, turn_rows

_Rows = dict[str, Tensor]


def bind_chain_triton(
    steps: Sequence[Step],
    given: Mapping[str, int],
    wanted: Sequence[str],
    dtype: torch.dtype = torch.bfloat16,
    early: bool = True,
) -> Chain:
    """`dtype`: fp16 instead, which the kernels compute as they do bf16, and which Triton's interpreter rounds right.

    `early`: kernels come up before the one before has ended, where the GPU can do that (early.py).
    """
    for step in steps:
        check_weights(step, dtype)
        assert not isinstance(step, Normalize) or len(step.w_D) <= WIDEST_ROW, f"more than {WIDEST_ROW} in a row"
    widths = widths_of(steps, given)
    fused = fuse(steps, widths, wanted)
    calls = [(_call(each, early), done) for each, done in zip(fused, _last_reads(fused, wanted), strict=True)]
    sizes = [widths[name] for name in given]

    def chain_triton(*inputs: Tensor) -> tuple[Tensor, ...]:
        num_rows = inputs[0].shape[0]
        for x, width in zip(inputs, sizes, strict=True):
            assert x.shape == (num_rows, width), f"rows of {width} numbers"
            assert x.dtype == dtype, f"not compiled for {x.dtype}"
            assert x.stride(1) == 1 or width == 1, "the numbers of a row lie side by side"
        if not num_rows:
            return tuple(inputs[0].new_empty((0, widths[name])) for name in wanted)
        rows = dict(zip(given, inputs, strict=True))
        for call, done in calls:
            call(rows)
            for name in done:
                del rows[name]
        return tuple(rows[name] for name in wanted)

    return chain_triton


def _last_reads(fused: Sequence[Fused], wanted: Sequence[str]) -> list[list[str]]:
    """For each the rows that nobody needs after it: of a long prompt they are large."""
    needed = set(wanted)
    lasts: list[list[str]] = []
    for each in reversed(fused):
        here = [name for name in inputs_of(each) if name not in needed]
        needed.update(here)
        lasts.append(here)
    return lasts[::-1]


def _call(fused: Fused, early: bool) -> Callable[[_Rows], None]:
    match fused:
        case Products():
            return _products(fused, early)
        case Sum():
            return partial(_sum, fused, early)
        case Turn():
            return partial(_turn, fused, early)
        case Gated():
            return partial(_gate, fused, early)


def _products(fused: Products, early: bool) -> Callable[[_Rows], None]:
    multiplies = fused.multiplies
    weights, biases = [m.w_NK for m in multiplies], [m.b_N for m in multiplies if m.b_N is not None]
    w_NK, b_N = one_behind_the_other(weights), one_behind_the_other(biases)
    if w_NK is None or len(biases) not in (0, len(weights)) or (biases and b_N is None):
        return partial(_each, fused, early)
    return partial(_together, fused, early, w_NK, b_N, [len(w) for w in weights])


def _each(fused: Products, early: bool, rows: _Rows) -> None:
    """Layers whose weights lie apart, one by one."""
    if _gated_few(fused, early, rows):
        return
    for m in fused.multiplies:
        rows[m.y] = multiply(rows[m.x], m.w_NK, m.b_N, None, early)
    _gate_made(fused, early, rows)


def _together(
    fused: Products, early: bool, w_NK: Tensor, b_N: Tensor | None, sizes: Sequence[int], rows: _Rows
) -> None:
    """Layers, or a single one, with weights in one piece."""
    if _gated_few(fused, early, rows):
        return
    x_TK, add = rows[fused.multiplies[0].x], fused.add
    if add is not None:
        own = fused.multiplies[0].y
        rows[add.y] = multiply(x_TK, w_NK, b_N, rows[add.b if add.a == own else add.a], early)
        return
    parts = multiply(x_TK, w_NK, b_N, None, early).split(sizes, dim=1)
    rows.update(zip((m.y for m in fused.multiplies), parts, strict=True))
    _gate_made(fused, early, rows)


def _gated_few(fused: Products, early: bool, rows: _Rows) -> bool:
    """Two layers and their gate in one kernel, on few rows."""
    x_TK, gate = rows[fused.multiplies[0].x], fused.gate
    if gate is None or x_TK.shape[0] > MOST_ROWS:
        return False
    weights = {m.y: m.w_NK for m in fused.multiplies}
    rows[gate.y] = multiply_gated_few(x_TK, weights[gate.gate], weights[gate.up], gate.activation, early)
    return True


def _gate_made(fused: Products, early: bool, rows: _Rows) -> None:
    if fused.gate is not None:
        gate, up = rows.pop(fused.gate.gate), rows.pop(fused.gate.up)
        rows[fused.gate.y] = gate_rows(gate, up, fused.gate.activation, early)


def multiply(x_TK: Tensor, w_NK: Tensor, b_N: Tensor | None, a_TN: Tensor | None, early: bool = True) -> Tensor:
    """x w^T + b, rounded; plus `a`, where it is given."""
    if x_TK.shape[0] <= MOST_ROWS:
        return multiply_few(x_TK, w_NK, b_N, a_TN, early)
    y_TN = torch.nn.functional.linear(x_TK, w_NK, b_N)
    return y_TN if a_TN is None else a_TN + y_TN


def _sum(fused: Sum, early: bool, rows: _Rows) -> None:
    before, add, after = fused.before, fused.add, fused.after
    if add is None:
        assert after is not None, "nothing to do"
        rows[after.y] = normalize_rows(rows[after.x], after, early)
    elif before is None and after is None:
        rows[add.y] = rows[add.a] + rows[add.b]
    else:
        # What is normalized before goes first.
        x, other = (add.a, add.b) if before is None or add.a == before.y else (add.b, add.a)
        made = add_rows(rows[x if before is None else before.x], rows[other], before, after, early)
        rows[add.y] = made[0]
        if after is not None:
            rows[after.y] = made[1]


def _turn(fused: Turn, early: bool, rows: _Rows) -> None:
    norms, rotates = [norm for norm, _ in fused.turns], [rotate for _, rotate in fused.turns]
    xs_TK = [rows[rotate.x if norm is None else norm.x] for norm, rotate in fused.turns]
    made = turn_rows(xs_TK, norms, rows[rotates[0].cos], rows[rotates[0].sin], rotates[0].dim, early)
    rows.update(zip((rotate.y for rotate in rotates), made, strict=True))


def _gate(fused: Gated, early: bool, rows: _Rows) -> None:
    rows[fused.gate.y] = gate_rows(rows[fused.gate.gate], rows[fused.gate.up], fused.gate.activation, early)


def one_behind_the_other(parts: Sequence[Tensor]) -> Tensor | None:
    """Tensors of one memory that follow each other there, as one; None: they do not."""
    if not parts:
        return None
    first, at = parts[0], parts[0].data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.data_ptr() != at or part.stride() != first.stride() or part.shape[1:] != first.shape[1:]:
            return None
        at += part.shape[0] * part.stride(0) * part.element_size()
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())
