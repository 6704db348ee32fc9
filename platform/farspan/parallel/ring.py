"""Ring attention: keys and values travel from rank to rank, queries stay.

Shapes: R ranks, t tokens a rank holds, H query heads, G key/value heads, D head dim of q and k, C of v.
At hop h rank r holds the keys of rank r - h. The next block is on its way while the current one is computed. A block
that no query of this rank sees is passed on and costs no computation; a hop at which a window hides every rank's block
is jumped over, and the next goes as far as both. In backward the gradients of a block travel
with it, in fp32 or wider, and the last hop brings them home.
Source: Ring Attention (Liu et al. 2023, https://arxiv.org/abs/2310.01889).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from farspan.parallel.blockwise import BlockwiseAttention, Gradients, Partial, Rule, add_gradients, zeros_wide
from farspan.parallel.exchange import Exchange, Transfer
from farspan.parallel.pairs import PairTable
from farspan.parallel.traffic import Block, Traffic


@dataclass(frozen=True)
class RingAttention(BlockwiseAttention):
    """Rank r of `exchange` holds the tokens of rank r of `table`."""

    exchange: Exchange
    table: PairTable

    def forward(self, q_tHD: Tensor, k_tGD: Tensor, v_tGC: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        rank, num_ranks = self.exchange.rank, self.exchange.num_ranks
        partial, held = Partial(q_tHD, v_tGC.shape[2]), (k_tGD, v_tGC)
        for hop, to_next in self._hops(rule):
            owner, last = (rank - hop) % num_ranks, hop + to_next == num_ranks
            coming = None if last else self.exchange.pass_on(held, to_next)
            partial.add(q_tHD, *held, self.table.between(rank, owner, rule.window, rule.chunk), rule)
            if coming is not None:
                held = _two(coming)
        return partial.out_tHC.to(q_tHD.dtype), partial.lse_tH

    def backward(
        self, dout_tHC: Tensor, q_tHD: Tensor, k_tGD: Tensor, v_tGC: Tensor, out_tHC: Tensor, lse_tH: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        rank, num_ranks = self.exchange.rank, self.exchange.num_ranks
        dq_tHD, held = zeros_wide(q_tHD), (k_tGD, v_tGC)
        sums: Transfer | None = None
        for hop, to_next in self._hops(rule):
            owner, last = (rank - hop) % num_ranks, hop + to_next == num_ranks
            coming = None if last else self.exchange.pass_on(held, to_next)
            into = Gradients(dq_tHD, zeros_wide(held[0]), zeros_wide(held[1]))
            met = self.table.between(rank, owner, rule.window, rule.chunk)
            add_gradients(into, dout_tHC, q_tHD, *held, out_tHC, lse_tH, met, rule)
            if sums is not None:
                # They were on their way while this block's own part was computed.
                for ours, theirs in zip((into.dk_sGD, into.dv_sGC), _two(sums), strict=True):
                    ours += theirs
            sums = self.exchange.pass_on((into.dk_sGD, into.dv_sGC), to_next)
            if coming is not None:
                held = _two(coming)
        assert sums is not None, "a ring has at least one rank"
        return dq_tHD, *_two(sums)

    def _hops(self, rule: Rule) -> list[tuple[int, int]]:
        """(hop, how far on the next one is); from the last it is the way home."""
        stops = (0, *self.table.hops(rule.window, rule.chunk), self.exchange.num_ranks)
        return [(hop, further - hop) for hop, further in pairwise(stops)]


def _two(transfer: Transfer) -> tuple[Tensor, Tensor]:
    first, second = transfer.wait()
    return first, second


def bytes_sent(block: Block, num_ranks: int, num_hops: int | None = None) -> Traffic:
    """Keys and values R - 1 hops (or as many as a window needs), twice; their gradients those and the way home."""
    hops = num_ranks - 1 if num_hops is None else num_hops
    keys = hops * block.kv_numbers * block.itemsize
    gradients = 0 if hops == 0 else (hops + 1) * block.kv_numbers * block.wide
    return Traffic(forward=keys, backward=keys + gradients)
