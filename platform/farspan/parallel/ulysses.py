"""Ulysses: trade sequence shards for head shards, attend over whole documents, trade back.

Shapes: T tokens of the sequence, R ranks, t = T / R tokens a rank holds, H query heads, G key/value heads, D head dim.
Between the two exchanges a rank holds every token of H / R query heads.
Source: DeepSpeed-Ulysses (Jacobs et al. 2023, https://arxiv.org/abs/2309.14509).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.parallel.documents import attend_documents
from farspan.parallel.exchange import Exchange


@dataclass(frozen=True)
class UlyssesAttention:
    """Attention of one packed sequence whose tokens lie contiguously over the ranks of `exchange`."""

    exchange: Exchange
    bounds: Sequence[int]

    def __call__(
        self,
        q_tHD: Tensor,
        k_tGD: Tensor,
        v_tGD: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        num_ranks, num_q_heads = self.exchange.num_ranks, q_tHD.shape[1]
        if num_q_heads % num_ranks != 0:
            raise ValueError(f"ulysses needs query heads divisible by sp, got {num_q_heads} heads on {num_ranks} ranks")
        # Each rank must hold the key heads its query heads read: with fewer of them than ranks they are repeated.
        copies = math.lcm(k_tGD.shape[1], num_ranks) // k_tGD.shape[1]
        k_tGD, v_tGD = (x.repeat_interleave(copies, dim=1) if copies > 1 else x for x in (k_tGD, v_tGD))
        q_THD, k_TGD, v_TGD = self._gather_tokens(q_tHD, k_tGD, v_tGD)
        out_THD = attend_documents(q_THD, k_TGD, v_TGD, self.bounds, scale, window, softcap, chunk)
        return self._scatter_tokens(out_THD)

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

    def _scatter_tokens(self, out_THD: Tensor) -> Tensor:
        """[T, H / R, D] -> [t, H, D]."""
        by_rank = self.exchange.all_to_all(out_THD.unflatten(0, (self.exchange.num_ranks, -1)))
        return by_rank.transpose(0, 1).flatten(1, 2)
