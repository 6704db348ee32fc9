"""Backward of windows by a causal kernel: a document in blocks as long as the window.

A query's window is two triangles. In its own block it sees the keys up to itself: causal. In the block before it sees
the keys after the one as far in as itself; with queries and keys of that block both read backwards, and queries one
place on, that is causal, too. So all blocks of a document are one batch of a causal kernel, twice, and nothing is
computed that a window hides. Gradients of parts add up, because each is taken at the final out and log-sum-exp.

Forward, and what is no whole block, are the kernel's that is given. Letters: contract.py; N blocks of W tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from farspan.kernels.attention.flash import FlashKernel, Sight, Spans, spans_of_pair
from farspan.kernels.attention.flash_runs import backward_by_runs, lengths_of, split

CausalBackward: TypeAlias = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]
]
"""(dout, q, k, v, out, lse, scale), each [N, W, heads, D] but lse [N, heads, W], to (dq, dk, dv)."""

# Tokens of a call: enough to fill a GPU, few enough that what it works with, and copies read backwards, stay small.
_TOKENS_AT_ONCE = 32768
# A query that sees nothing: exp(score - this) is 0.
_NEVER = 1e30


@dataclass(frozen=True, slots=True)
class WindowBlocks:
    """A `FlashKernel`: in blocks, the backward of windows of `least_tokens` and more over documents twice as long."""

    causal: CausalBackward
    rest: FlashKernel
    least_tokens: int

    def forward(self, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, spans: Spans, sight: Sight) -> tuple[Tensor, Tensor]:
        return self.rest.forward(q_THD, k_SGD, v_SGD, spans, sight)

    def backward(
        self,
        dout_THD: Tensor,
        q_THD: Tensor,
        k_SGD: Tensor,
        v_SGD: Tensor,
        out_THD: Tensor,
        lse_HT: Tensor,
        spans: Spans,
        sight: Sight,
    ) -> tuple[Tensor, Tensor, Tensor]:
        are_long = [self._is_long(queries, keys, sight) for queries, keys in lengths_of(spans)]
        given = (dout_THD, q_THD, k_SGD, v_SGD, out_THD, lse_HT)
        if are_long == [True]:
            return self._document(*given, sight)
        if not any(are_long):
            return self.rest.backward(*given, spans, sight)
        return backward_by_runs(split(spans, are_long, self, self.rest), *given, spans, sight)

    def _is_long(self, queries: int, keys: int, sight: Sight) -> bool:
        if sight.softcap is not None or sight.right != 0:
            return False
        return sight.left + 1 >= self.least_tokens and queries == keys >= 2 * (sight.left + 1)

    def _document(
        self,
        dout_THD: Tensor,
        q_THD: Tensor,
        k_SGD: Tensor,
        v_SGD: Tensor,
        out_THD: Tensor,
        lse_HT: Tensor,
        sight: Sight,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of one long document."""
        width = sight.left + 1
        whole = q_THD.shape[0] // width * width
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THD, k_SGD, v_SGD)]
        dout, q, k, v, out = (x[:whole].unflatten(0, (-1, width)) for x in (dout_THD, q_THD, k_SGD, v_SGD, out_THD))
        lse = lse_HT[:, :whole].unflatten(1, (-1, width)).transpose(0, 1)
        dq, dk, dv = (grad[:whole].unflatten(0, (-1, width)) for grad in grads)
        for here in _groups(0, q.shape[0], width):
            parts = self.causal(dout[here], q[here], k[here], v[here], out[here], lse[here], sight.scale)
            dq[here], dk[here], dv[here] = parts
        for here in _groups(1, q.shape[0], width):
            there = slice(here.start - 1, here.stop - 1)
            queries = (dout[here], q[here], out[here], lse[here])
            dq_part, dk_part, dv_part = self._from_before(*queries, k[there], v[there], sight.scale)
            dq[here, :-1] += dq_part
            dk[there] += dk_part
            dv[there] += dv_part
        if whole < q_THD.shape[0]:
            self._add_end(grads, (dout_THD, q_THD, k_SGD, v_SGD, out_THD), lse_HT, whole, sight)
        return grads[0], grads[1], grads[2]

    def _from_before(
        self, dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What queries, but the last of each block, take from the block before theirs: (dq, dk, dv)."""
        # Backwards, one place on: the block's last query sees nothing here. It comes last, and so does the first key,
        # which nobody sees.
        order = torch.arange(q.shape[1] - 1, -1, -1, device=q.device).roll(-1)
        lse = lse.index_select(2, order)
        lse[:, :, -1] = _NEVER
        dout, q, out = (x.index_select(1, order) for x in (dout, q, out))
        dq, dk, dv = self.causal(dout, q, k.flip(1), v.flip(1), out, lse, scale)
        return dq[:, :-1].flip(1), dk.flip(1), dv.flip(1)

    def _add_end(
        self, grads: list[Tensor], inputs: tuple[Tensor, ...], lse_HT: Tensor, first: int, sight: Sight
    ) -> None:
        """The queries behind the last whole block, and all keys that they see."""
        dq, dk, dv = grads
        dout, q, k, v, out = inputs
        keys = slice(first - sight.left, None)
        parts = (dout[first:], q[first:], k[keys], v[keys], out[first:])
        spans = spans_of_pair(parts[1], parts[2])
        dq[first:], dk_part, dv_part = self.rest.backward(*parts, lse_HT[:, first:].contiguous(), spans, sight)
        for grad, part in ((dk, dk_part), (dv, dv_part)):
            grad[first:] = part[sight.left :]
            grad[first - sight.left : first] += part[: sight.left]


def _groups(first: int, stop: int, width: int) -> Iterator[slice]:
    """Blocks first..stop, as many at a time as one call takes."""
    at_once = max(1, _TOKENS_AT_ONCE // width)
    for start in range(first, stop, at_once):
        yield slice(start, min(start + at_once, stop))
