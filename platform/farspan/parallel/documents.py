"""Causal attention inside each document when one rank holds all tokens: the one-rank case of every strategy.

Shapes: T tokens of the whole sequence, H query heads, G key/value heads, D head dim of q and k, C of v.
Documents never see each other because a pair is only ever computed inside one document: there is no mask to lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from farspan.kernels.attention.dispatch import choose_backend
from farspan.kernels.attention.limits import Ask
from farspan.parallel.blockwise import (
    BlockwiseAttention,
    Gradients,
    Partial,
    Rule,
    add_gradients,
    attend_pair,
    gradients_of,
    zeros_wide,
)
from farspan.parallel.pairs import Pair, PairTable, chunk_bounds


def attend_documents(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGC: Tensor,
    bounds: Sequence[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """out_THC of causal attention inside each document; `bounds` are the N + 1 offsets of the documents."""
    num_tokens = q_THD.shape[0]
    assert bounds[0] == 0, "documents start at token 0"
    assert bounds[-1] == num_tokens, "documents cover the sequence"
    local = LocalAttention(PairTable((((0, num_tokens),),), tuple(bounds)))
    return local(q_THD, k_TGD, v_TGC, scale=scale, window=window, softcap=softcap, chunk=chunk, sinks_H=sinks_H)


@dataclass(frozen=True)
class LocalAttention(BlockwiseAttention):
    """Attention among the tokens of one rank; `table` has that rank only. Nothing is sent.

    Tokens in the order of the sequence are one packed call (one launch on a GPU); tokens in another order, which
    Ulysses gathers from a zigzag, are computed pair by pair.
    """

    table: PairTable

    def forward(self, q_tHD: Tensor, k_tGD: Tensor, v_tGC: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        met = self.table.between(0, 0, rule.window, rule.chunk)
        if _whole(met, q_tHD.shape[0]):
            return attend_pair(q_tHD, k_tGD, v_tGC, met[0], rule)
        if self._in_order:
            attend = choose_backend(Ask.of(q_tHD, v_tGC, rule.softcap)).packed_forward
            return attend(q_tHD, k_tGD, v_tGC, **self._packed(rule))
        partial = Partial(q_tHD, v_tGC.shape[2])
        partial.add(q_tHD, k_tGD, v_tGC, met, rule)
        return partial.out_tHC.to(q_tHD.dtype), partial.lse_tH

    def backward(
        self, dout_tHC: Tensor, q_tHD: Tensor, k_tGD: Tensor, v_tGC: Tensor, out_tHC: Tensor, lse_tH: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        met = self.table.between(0, 0, rule.window, rule.chunk)
        if _whole(met, q_tHD.shape[0]):
            return gradients_of(dout_tHC, q_tHD, k_tGD, v_tGC, out_tHC, lse_tH, met[0], rule)
        if self._in_order:
            attend_backward = choose_backend(Ask.of(q_tHD, v_tGC, rule.softcap)).packed_backward
            return attend_backward(dout_tHC, q_tHD, k_tGD, v_tGC, out_tHC, lse_tH, **self._packed(rule))
        into = Gradients(*(zeros_wide(x) for x in (q_tHD, k_tGD, v_tGC)))
        add_gradients(into, dout_tHC, q_tHD, k_tGD, v_tGC, out_tHC, lse_tH, met, rule)
        return into

    @property
    def _in_order(self) -> bool:
        return self.table.ranges == (((0, self.table.bounds[-1]),),)

    def _packed(self, rule: Rule) -> dict[str, Any]:
        bounds = chunk_bounds(self.table.bounds, rule.chunk)
        return {"bounds": bounds, "scale": rule.scale, "window": rule.window, "softcap": rule.softcap}


def _whole(met: Sequence[Pair], num_tokens: int) -> bool:
    """Whether one pair is everything, so that its results need no buffer to be put into."""
    return len(met) == 1 and met[0].queries == met[0].keys == slice(0, num_tokens)
