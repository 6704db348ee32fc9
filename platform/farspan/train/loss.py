"""Next-token loss of a packed shard, by tiles of tokens, divided by a number known before backward.

Shapes: T tokens of the shard, E model width, V vocabulary; t tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from farspan.activations.tiled import by_tiles
from farspan.batch import IGNORED_LABEL, ShardedBatch
from farspan.kernels.linear_cross_entropy.contract import HeadRule
from farspan.kernels.linear_cross_entropy.op import linear_cross_entropy
from farspan.kernels.linear_cross_entropy.reference import losses_of_logits
from farspan.models.attention import LayeredAttention, PackedAttention, packed_hidden
from farspan.models.mixers import Whole
from farspan.models.parts import LinearHead, trunk_and_head


class PackedLoss(nn.Module):
    """A causal model and its loss as one module, so that sharded weights are gathered for both."""

    def __init__(
        self, model: PreTrainedModel, tile_tokens: int, *, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> None:
        super().__init__()
        self.model = model
        self.tile_tokens = tile_tokens
        self.label_smoothing, self.z_loss = label_smoothing, z_loss

    def forward(
        self,
        shard: ShardedBatch,
        attention: PackedAttention | LayeredAttention,
        num_labels: Tensor,
        whole: Whole | None = None,
        weights_T: Tensor | None = None,
    ) -> Tensor:
        """Summed negative log likelihood of this shard / `num_labels`.

        `num_labels` is the number of valid labels of the whole optimizer step over every rank: the sum of what ranks
        and accumulation steps return is then the mean over tokens, however they were cut. A step without one valid
        label has loss 0 and gradients 0. `whole` is the sequence this shard is of, which recurrent layers need.
        `weights_T` counts each token that often; `num_labels` is then the sum of weights.
        """
        hidden_TE = packed_hidden(self.model, shard.tokens_T, shard.positions_T, attention, whole)
        _, head = trunk_and_head(self.model)
        loss_T = token_losses(
            head,
            hidden_TE,
            shard.labels_T,
            self.tile_tokens,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )
        total = loss_T.sum() if weights_T is None else (loss_T * weights_T).sum()
        return total / num_labels.clamp_min(1)


def token_losses(
    head: LinearHead,
    hidden_TE: Tensor,
    labels_T: Tensor,
    tile_tokens: int,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """loss_T of every token, 0 where it has no label; logits of one tile exist at a time, in backward too."""
    rule = HeadRule(head.factor, head.softcap, label_smoothing, z_loss, IGNORED_LABEL)
    plain = head.plain
    if plain is not None:
        return linear_cross_entropy(
            hidden_TE, plain.weight, labels_T, tile_tokens=tile_tokens, bias_V=plain.bias, rule=rule
        )
    # An adapter or a quantized weight: the layer itself is run by tiles, whatever it computes.
    weights = {name: p for name, p in head.linear.named_parameters() if p.requires_grad}

    def losses(given: Mapping[str, Tensor], hidden_tE: Tensor, rows: slice) -> Tensor:
        logits_tV = functional_call(head.linear, dict(given), (hidden_tE,))
        return losses_of_logits(logits_tV, labels_T[rows], rule)

    return by_tiles(losses, weights, hidden_TE, tile_tokens)
