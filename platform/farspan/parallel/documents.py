"""Causal attention inside each document when one rank holds all tokens: the one-rank case of every strategy.

Shapes: T tokens of the whole sequence, H query heads, G key/value heads, D head dim of q and k, C of v.
Documents never see each other because a pair is only ever computed inside one document: there is no mask to lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.parallel.blockwise import BlockwiseAttention, Gradients, Partial, Rule, add_gradients, wide_dtype
from farspan.parallel.pairs import Pair, PairTable


def attend_documents(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGC: Tensor,
    bounds: Sequence[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """out_THC of causal attention inside each document; `bounds` are the N + 1 offsets of the documents."""
    num_tokens = q_THD.shape[0]
    assert bounds[0] == 0, "documents start at token 0"
    assert bounds[-1] == num_tokens, "documents cover the sequence"
    local = LocalAttention(PairTable((((0, num_tokens),),), tuple(bounds)))
    return local(q_THD, k_TGD, v_TGC, scale=scale, window=window, softcap=softcap, chunk=chunk)


@dataclass(frozen=True)
class LocalAttention(BlockwiseAttention):
    """Attention among the tokens of one rank; `table` has that rank only. Nothing is sent."""

    table: PairTable

    def forward(self, q_tHD: Tensor, k_tGD: Tensor, v_tGC: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        met = self.table.between(0, 0, rule.window, rule.chunk)
        dtype = q_tHD.dtype if _once(met, q_tHD.shape[0]) else wide_dtype(q_tHD.dtype)
        partial = Partial(q_tHD, v_tGC.shape[2], dtype=dtype)
        partial.add(q_tHD, k_tGD, v_tGC, met, rule)
        return partial.out_tHC.to(q_tHD.dtype), partial.lse_tH

    def backward(
        self, dout_tHC: Tensor, q_tHD: Tensor, k_tGD: Tensor, v_tGC: Tensor, out_tHC: Tensor, lse_tH: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        met = self.table.between(0, 0, rule.window, rule.chunk)
        dtype = q_tHD.dtype if _once(met, q_tHD.shape[0]) else wide_dtype(q_tHD.dtype)
        into = Gradients(*(torch.zeros_like(x, dtype=dtype) for x in (q_tHD, k_tGD, v_tGC)))
        add_gradients(into, dout_tHC, q_tHD, k_tGD, v_tGC, out_tHC, lse_tH, met, rule)
        return into


def _once(met: Sequence[Pair], num_tokens: int) -> bool:
    """Whether every token meets one pair only, so that nothing is summed and no wide copy is needed."""
    queries = sum(p.queries.stop - p.queries.start for p in met)
    keys = sum(p.keys.stop - p.keys.start for p in met)
    return queries <= num_tokens and keys <= num_tokens
