"""Ulysses: trade sequence shards for head shards, attend over the whole sequence, trade back.

Shapes: R ranks, t tokens a rank holds, T = R * t, H query heads, G key/value heads, D head dim of q and k, C of v.
Between the two exchanges a rank holds every token of H / R query heads, in the order the ranks hold them. What is
attended there is another strategy: on one rank alone (Ulysses), or a ring (hybrid).
Source: DeepSpeed-Ulysses (Jacobs et al. 2023, https://arxiv.org/abs/2309.14509).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.parallel.blockwise import Strategy
from farspan.parallel.exchange import Exchange
from farspan.parallel.heads import plan_heads
from farspan.parallel.traffic import Block, Traffic


@dataclass(frozen=True)
class UlyssesAttention:
    """`inside` attends over the tokens that all ranks of `exchange` hold together, laid end to end in rank order."""

    exchange: Exchange
    inside: Strategy

    def __call__(
        self,
        q_tHD: Tensor,
        k_tGD: Tensor,
        v_tGC: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        heads = plan_heads(q_tHD.shape[1], k_tGD.shape[1], self.exchange.num_ranks)
        q_THD, k_TGD, v_TGC = self._gather_tokens(
            heads.spread_queries(q_tHD), heads.spread_keys(k_tGD), heads.spread_keys(v_tGC)
        )
        out_THC = self.inside(q_THD, k_TGD, v_TGC, scale=scale, window=window, softcap=softcap, chunk=chunk)
        return heads.collect(self._scatter_tokens(out_THC))

    def _gather_tokens(self, *tensors: Tensor) -> list[Tensor]:
        """[t, heads, D] each -> [T, heads / R, D] each, in one exchange."""
        num_ranks = self.exchange.num_ranks
        # [t, heads, D] -> [R, t, heads / R * D]: row r is what rank r needs of every tensor.
        by_rank = [x.unflatten(1, (num_ranks, -1)).transpose(0, 1).flatten(2) for x in tensors]
        widths = [x.shape[2] for x in by_rank]
        gathered = self.exchange.all_to_all(torch.cat(by_rank, dim=2)).flatten(0, 1)
        return [
            part.unflatten(1, (-1, x.shape[2])) for part, x in zip(gathered.split(widths, dim=1), tensors, strict=True)
        ]

    def _scatter_tokens(self, out_THC: Tensor) -> Tensor:
        """[T, H / R, C] -> [t, H, C]."""
        by_rank = self.exchange.all_to_all(out_THC.unflatten(0, (self.exchange.num_ranks, -1)))
        return by_rank.transpose(0, 1).flatten(1, 2)


def inner_block(block: Block, num_ranks: int) -> Block:
    """What a rank holds between the two exchanges."""
    heads = plan_heads(block.num_q_heads, block.num_kv_heads, num_ranks)
    return block.with_heads(block.num_tokens * num_ranks, heads.q_heads // num_ranks, heads.kv_heads // num_ranks)


def bytes_sent(block: Block, num_ranks: int) -> Traffic:
    """q, k, v there and out back, all but a rank's own part; the same again in backward."""
    inside = inner_block(block, num_ranks)
    numbers = inside.q_numbers + inside.kv_numbers + inside.out_numbers
    one_way = numbers * block.itemsize * (num_ranks - 1) // num_ranks
    return Traffic(forward=one_way, backward=one_way)
