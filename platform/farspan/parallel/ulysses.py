"""Ulysses: trade sequence shards for head shards, attend over the whole sequence, trade back.

Shapes: R ranks, t tokens a rank holds, T = R * t, H query heads, G key/value heads, D head dim of q and k, C of v.
Between the two exchanges a rank holds every token of H / R query heads, in the order the ranks hold them. What is
attended there is another strategy: on one rank alone (Ulysses), or a ring (hybrid). Where a rank holds several key
heads they are exchanged in stages, so that the next stage travels while one is computed. On CPU there is one stage:
what moves data between processes there are the cores that compute, and smaller calls only cost more.
Source: DeepSpeed-Ulysses (Jacobs et al. 2023, https://arxiv.org/abs/2309.14509).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.parallel.blockwise import Strategy
from farspan.parallel.exchange import Exchange, Swap
from farspan.parallel.heads import HeadPlan, plan_heads
from farspan.parallel.traffic import Block, Traffic


@dataclass(frozen=True)
class UlyssesAttention:
    """`inside` attends over the tokens that all ranks of `exchange` hold together, laid end to end in rank order."""

    exchange: Exchange
    inside: Strategy
    max_stages: int | None = None
    """None: four on a GPU, one on CPU."""

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
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        num_ranks = self.exchange.num_ranks
        heads = plan_heads(q_tHD.shape[1], k_tGD.shape[1], num_ranks)
        num_stages = self._num_stages(heads.kv_heads // num_ranks, q_tHD.device)
        spread = (heads.spread_queries(q_tHD), heads.spread_keys(k_tGD), heads.spread_keys(v_tGC))
        # S stages: [t, heads, D] -> [t, R, S, heads / R / S, D], because neighbours go to one rank.
        staged = [x.unflatten(1, (num_ranks, num_stages, -1)) for x in spread]
        sinks_SH = self._own_sinks(sinks_H, heads, num_stages)
        coming, found = self._gather([x[:, :, 0] for x in staged]), []
        for stage in range(num_stages):
            q_THD, k_TGD, v_TGC = coming.wait()
            if stage + 1 < num_stages:
                coming = self._gather([x[:, :, stage + 1] for x in staged])
            out_THC = self.inside(
                q_THD, k_TGD, v_TGC, scale=scale, window=window, softcap=softcap, chunk=chunk, sinks_H=sinks_SH[stage]
            )
            found.append(self.exchange.swap(out_THC.unflatten(0, (num_ranks, -1))))
        parts = [swap.wait() for swap in found]
        # One stage is a view: stacking it would copy the whole output.
        out_RtSHC = parts[0].unsqueeze(2) if num_stages == 1 else torch.stack(parts, dim=2)
        return heads.collect(out_RtSHC.transpose(0, 1).flatten(1, 3))

    def _own_sinks(self, sinks_H: Tensor | None, heads: HeadPlan, num_stages: int) -> Sequence[Tensor | None]:
        """Per stage the sinks of the query heads this rank attends with; gradients of the others are zero here."""
        if sinks_H is None:
            return [None] * num_stages
        spread_H = heads.spread_queries(sinks_H[None, :, None]).flatten()
        return spread_H.unflatten(0, (self.exchange.num_ranks, num_stages, -1))[self.exchange.rank].unbind()

    def _num_stages(self, kv_heads: int, device: torch.device) -> int:
        most = self.max_stages or (1 if device.type == "cpu" else 4)
        return max(n for n in range(1, most + 1) if kv_heads % n == 0)

    def _gather(self, tensors: Sequence[Tensor]) -> _Gathering:
        """Start [t, R, heads, D] each -> [T, heads, D] each, in one exchange."""
        # Row r is what rank r needs of every tensor.
        by_rank = [x.transpose(0, 1).flatten(2) for x in tensors]
        return _Gathering(self.exchange.swap(torch.cat(by_rank, dim=2)), [x.shape[2:] for x in tensors])


@dataclass(frozen=True)
class _Gathering:
    """Queries, keys and values on their way; `shapes` are (heads, head dim) of each."""

    swap: Swap
    shapes: list[torch.Size]

    def wait(self) -> list[Tensor]:
        parts = self.swap.wait().flatten(0, 1).split([shape.numel() for shape in self.shapes], dim=1)
        return [part.unflatten(1, tuple(shape)) for part, shape in zip(parts, self.shapes, strict=True)]


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
