"""All-gather attention: every rank collects all keys and values and computes its own queries.

Shapes: R ranks, t tokens a rank holds, H query heads, G key/value heads, D head dim of q and k, C of v.
One collective instead of R - 1 hops, at the price of holding R * t keys while a layer is computed. A rank's own block
is computed while the others arrive. Keys are collected again in backward rather than kept, and their gradients are
summed over ranks in fp32 or wider (a reduce-scatter).
Source: the context parallelism of Llama 3 (Grattafiori et al. 2024, section 3.3.2, https://arxiv.org/abs/2407.21783).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from farspan.parallel.blockwise import (
    BlockwiseAttention,
    Gradients,
    Partial,
    Rule,
    add_gradients,
    wide_dtype,
    zeros_wide,
)
from farspan.parallel.exchange import Exchange
from farspan.parallel.pairs import PairTable
from farspan.parallel.traffic import Block, Traffic


@dataclass(frozen=True)
class AllGatherAttention(BlockwiseAttention):
    """Rank r of `exchange` holds the tokens of rank r of `table`."""

    exchange: Exchange
    table: PairTable

    def forward(self, q_tHD: Tensor, k_tGD: Tensor, v_tGC: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        rank, partial = self.exchange.rank, Partial(q_tHD, v_tGC.shape[2])
        coming = self.exchange.gather((k_tGD, v_tGC))
        partial.add(q_tHD, k_tGD, v_tGC, self.table.between(rank, rank, rule.window, rule.chunk), rule)
        k_RtGD, v_RtGC = coming.wait()
        for other in self._others():
            met = self.table.between(rank, other, rule.window, rule.chunk)
            partial.add(q_tHD, k_RtGD[other], v_RtGC[other], met, rule)
        return partial.out_tHC.to(q_tHD.dtype), partial.lse_tH

    def backward(
        self, dout_tHC: Tensor, q_tHD: Tensor, k_tGD: Tensor, v_tGC: Tensor, out_tHC: Tensor, lse_tH: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        rank, num_ranks, wide = self.exchange.rank, self.exchange.num_ranks, wide_dtype(q_tHD.dtype)
        coming = self.exchange.gather((k_tGD, v_tGC))
        dq_tHD = zeros_wide(q_tHD)
        dk_RtGD, dv_RtGC = (x.new_zeros((num_ranks, *x.shape), dtype=wide) for x in (k_tGD, v_tGC))
        own = self.table.between(rank, rank, rule.window, rule.chunk)
        into = Gradients(dq_tHD, dk_RtGD[rank], dv_RtGC[rank])
        add_gradients(into, dout_tHC, q_tHD, k_tGD, v_tGC, out_tHC, lse_tH, own, rule)
        k_RtGD, v_RtGC = coming.wait()
        for other in self._others():
            met = self.table.between(rank, other, rule.window, rule.chunk)
            into = Gradients(dq_tHD, dk_RtGD[other], dv_RtGC[other])
            add_gradients(into, dout_tHC, q_tHD, k_RtGD[other], v_RtGC[other], out_tHC, lse_tH, met, rule)
        dk_tGD, dv_tGC = self.exchange.sum_rows((dk_RtGD, dv_RtGC)).wait()
        return dq_tHD, dk_tGD, dv_tGC

    def _others(self) -> list[int]:
        return [r for r in range(self.exchange.num_ranks) if r != self.exchange.rank]


def bytes_sent(block: Block, num_ranks: int) -> Traffic:
    """Own keys and values to each other rank, twice; in backward a block of sums for each other rank."""
    others = num_ranks - 1
    keys = others * block.kv_numbers * block.itemsize
    return Traffic(forward=keys, backward=keys + others * block.kv_numbers * block.wide)
