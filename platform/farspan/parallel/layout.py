"""Which tokens of a packed sequence each rank holds.

Shapes: T tokens of the sequence, R ranks that share it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.batch import PackedBatch, ShardedBatch


@dataclass(frozen=True, slots=True)
class ContiguousLayout:
    """Rank r holds tokens [r * T/R, (r + 1) * T/R): the layout of an exchange by heads, where every rank sees all."""

    num_tokens: int
    num_ranks: int

    def __post_init__(self) -> None:
        if self.num_tokens % self.num_ranks != 0:
            padded = -(-self.num_tokens // self.num_ranks) * self.num_ranks
            raise ValueError(
                f"contiguous layout needs num_tokens divisible by num_ranks, got {self.num_tokens} tokens "
                f"on {self.num_ranks} ranks; use {padded} tokens"
            )

    @property
    def shard_tokens(self) -> int:
        return self.num_tokens // self.num_ranks

    def tokens_of(self, rank: int) -> slice:
        """The token range of `rank`."""
        return slice(rank * self.shard_tokens, (rank + 1) * self.shard_tokens)

    def take(self, x_T: Tensor, rank: int) -> Tensor:
        """The rows of `x_T` [T, ...] that `rank` holds."""
        return x_T[self.tokens_of(rank)]

    def inverse(self) -> Tensor:
        """inverse_T: where each global token is when the shards are laid end to end."""
        return torch.arange(self.num_tokens)

    def index_of(self, rank: int) -> Tensor:
        """index_t: the global position of every token `rank` holds."""
        return torch.arange(self.num_tokens)[self.tokens_of(rank)]

    def shard(self, batch: PackedBatch, rank: int) -> ShardedBatch:
        """What `rank` holds of `batch`. Labels were shifted before: a shard's last label needs no neighbour."""
        held = self.tokens_of(rank)
        return ShardedBatch(
            tokens_T=batch.tokens_T[held],
            labels_T=batch.labels_T[held],
            positions_T=batch.positions_T[held],
            bounds=batch.bounds,
        )
