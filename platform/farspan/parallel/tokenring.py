"""TokenRing: keys and values stay, queries travel one way and what they found returns directly the other way.

Shapes: R ranks, t tokens a rank holds, H query heads, G key/value heads, D head dim of q and k, C of v.
At hop h rank r holds the queries of rank r - h; (out, lse) of that visit go straight back over h ranks while the next
queries arrive, so both directions of a full-duplex link are busy. It sends less than a ring of keys only where there
are fewer than about two query heads per key head.
In backward (q, dout, out, lse) travel, dq returns to its owner, and dk and dv never leave their rank. The log-sum-exp
and out are final, so no visit needs to know another.
Source: TokenRing (Wang et al. 2024, https://arxiv.org/abs/2412.20501), whose code has no backward; this one is ours.
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
class TokenRingAttention(BlockwiseAttention):
    """Rank r of `exchange` holds the tokens of rank r of `table`."""

    exchange: Exchange
    table: PairTable

    def forward(self, q_tHD: Tensor, k_tGD: Tensor, v_tGC: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        rank, num_ranks = self.exchange.rank, self.exchange.num_ranks
        own, visiting = Partial(q_tHD, v_tGC.shape[2]), q_tHD
        returning: Transfer | None = None
        before = 0
        for hop, to_next in self._hops(rule):
            owner, last = (rank - hop) % num_ranks, hop + to_next == num_ranks
            coming = None if last else self.exchange.pass_on((visiting,), to_next)
            found = own if hop == 0 else Partial(visiting, v_tGC.shape[2])
            found.add(visiting, k_tGD, v_tGC, self.table.between(owner, rank, rule.window, rule.chunk), rule)
            self._merge(own, returning, before, rule)
            before = hop
            if hop > 0:
                returning = self.exchange.pass_on((found.out_tHC.to(q_tHD.dtype), found.lse_tH), -hop)
            if coming is not None:
                (visiting,) = coming.wait()
        self._merge(own, returning, before, rule)
        return own.out_tHC.to(q_tHD.dtype), own.lse_tH

    def _hops(self, rule: Rule) -> list[tuple[int, int]]:
        """(hop, how far on the next one is): queries visit the ranks whose keys their owner may need."""
        num_ranks = self.exchange.num_ranks
        needed = sorted(num_ranks - hop for hop in self.table.hops(rule.window, rule.chunk))
        return [(hop, further - hop) for hop, further in pairwise((0, *needed, num_ranks))]

    def _merge(self, own: Partial, returning: Transfer | None, hop: int, rule: Rule) -> None:
        """Merge what this rank's queries found at `hop`, `hop` ranks further on."""
        if returning is None:
            return
        out_tHC, lse_tH = returning.wait()
        rank, num_ranks = self.exchange.rank, self.exchange.num_ranks
        if self.table.between(rank, (rank + hop) % num_ranks, rule.window, rule.chunk):
            own.merge(slice(0, out_tHC.shape[0]), out_tHC, lse_tH)

    def backward(
        self, dout_tHC: Tensor, q_tHD: Tensor, k_tGD: Tensor, v_tGC: Tensor, out_tHC: Tensor, lse_tH: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        rank, num_ranks = self.exchange.rank, self.exchange.num_ranks
        dq_tHD, dk_tGD, dv_tGC = zeros_wide(q_tHD), zeros_wide(k_tGD), zeros_wide(v_tGC)
        visiting: tuple[Tensor, ...] = (q_tHD, dout_tHC, out_tHC, lse_tH.contiguous())
        returning: Transfer | None = None
        for hop, to_next in self._hops(rule):
            owner, last = (rank - hop) % num_ranks, hop + to_next == num_ranks
            coming = None if last else self.exchange.pass_on(visiting, to_next)
            q, dout, out, lse = visiting
            into = Gradients(dq_tHD if hop == 0 else zeros_wide(q), dk_tGD, dv_tGC)
            met = self.table.between(owner, rank, rule.window, rule.chunk)
            add_gradients(into, dout, q, k_tGD, v_tGC, out, lse, met, rule)
            if returning is not None:
                dq_tHD += returning.wait()[0]
            if hop > 0:
                returning = self.exchange.pass_on((into.dq_tHD,), -hop)
            if coming is not None:
                visiting = coming.wait()
        if returning is not None:
            dq_tHD += returning.wait()[0]
        return dq_tHD, dk_tGD, dv_tGC


def bytes_sent(block: Block, num_ranks: int, num_hops: int | None = None) -> Traffic:
    """R - 1 visits, or as many as a window needs: queries there, out and lse back; in backward four tensors, and dq."""
    visits = num_ranks - 1 if num_hops is None else num_hops
    queries, outs = block.q_numbers * block.itemsize, block.out_numbers * block.itemsize
    return Traffic(
        forward=visits * (queries + outs + block.lse_bytes),
        backward=visits * (queries + 2 * outs + block.lse_bytes + block.q_numbers * block.wide),
    )
