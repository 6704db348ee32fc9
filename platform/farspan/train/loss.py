"""Next-token loss of a packed shard, by tiles of tokens, divided by a number known before backward.

Shapes: T tokens of the shard, E model width, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from farspan.batch import IGNORED_LABEL, ShardedBatch
from farspan.models.attention import PackedAttention, packed_hidden
from farspan.models.mixers import Whole
from farspan.models.parts import trunk_and_head


class PackedLoss(nn.Module):
    """A causal model and its loss as one module, so that sharded weights are gathered for both."""

    def __init__(self, model: PreTrainedModel, tile_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.tile_tokens = tile_tokens

    def forward(
        self, shard: ShardedBatch, attention: PackedAttention, num_labels: Tensor, whole: Whole | None = None
    ) -> Tensor:
        """Summed negative log likelihood of this shard / `num_labels`.

        `num_labels` is the number of valid labels of the whole optimizer step over every rank: the sum of what ranks
        and accumulation steps return is then the mean over tokens, however they were cut. A step without one valid
        label has loss 0 and gradients 0. `whole` is the sequence this shard is of, which recurrent layers need.
        """
        hidden_TE = packed_hidden(self.model, shard.tokens_T, shard.positions_T, attention, whole)
        return self._tiled(hidden_TE, shard.labels_T) / num_labels.clamp_min(1)

    def _tiled(self, hidden_TE: Tensor, labels_T: Tensor) -> Tensor:
        wide = torch.promote_types(hidden_TE.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden_TE.device)
        for tile_TE, tile_T in zip(hidden_TE.split(self.tile_tokens), labels_T.split(self.tile_tokens), strict=True):
            # Logits of one tile live only while it is computed; backward makes them again.
            total = total + cast(Tensor, checkpoint(self._summed_nll, tile_TE, tile_T, use_reentrant=False))
        return total

    def _summed_nll(self, hidden_TE: Tensor, labels_T: Tensor) -> Tensor:
        _, head = trunk_and_head(self.model)
        logits_TV = head(hidden_TE)
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        return nn.functional.cross_entropy(logits_TV.to(wide), labels_T, ignore_index=IGNORED_LABEL, reduction="sum")
