"""The shared words of training: a packed batch of whole sequences, and one rank's shard of it.

Shapes: T tokens of the packed sequence, N documents in it, R ranks that share it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Documents laid end to end in one sequence of T tokens.

    `labels_T` is already shifted inside each document: label t is token t + 1 of the same document, and the last
    token of a document has no label. `bounds` are the N + 1 token offsets at which documents begin, the last being
    T: they are the only source of truth about documents (position ids are derived from them, never read back).
    """

    tokens_T: Tensor
    labels_T: Tensor
    positions_T: Tensor
    bounds: tuple[int, ...]
    sample_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return int(self.tokens_T.numel())


@dataclass(frozen=True, slots=True)
class ShardedBatch:
    """The T / R tokens one rank holds, with the documents of the whole sequence."""

    tokens_T: Tensor
    labels_T: Tensor
    positions_T: Tensor
    bounds: tuple[int, ...]

    def to(self, device: torch.device) -> ShardedBatch:
        """The same on `device`."""
        return ShardedBatch(
            tokens_T=self.tokens_T.to(device),
            labels_T=self.labels_T.to(device),
            positions_T=self.positions_T.to(device),
            bounds=self.bounds,
        )
