"""Loss of every token of a sequence of any length: one forward, chunk after chunk, over an arena without gradients.

Shapes: T tokens, t tokens this rank holds of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from farspan.batch import IGNORED_LABEL, PackedBatch, ShardedBatch
from farspan.chunked.arena import KvArena
from farspan.chunked.attention import ChunkAttention
from farspan.chunked.seco import ChunkedStep
from farspan.kernels.linear_cross_entropy.contract import HeadRule
from farspan.kernels.linear_cross_entropy.op import linear_cross_entropy
from farspan.kernels.linear_cross_entropy.reference import losses_of_logits
from farspan.models.attention import packed_hidden
from farspan.models.parts import trunk_and_head


def chunked_losses(
    model: PreTrainedModel, batch: PackedBatch, chunk_tokens: int, *, tile_tokens: int, arena: KvArena | None = None
) -> Tensor:
    """loss_T of a whole sequence in this process, 0 where a token has no label; `use_farspan_attention` was called.

    Holds 4 * G * D bytes per token and layer in bf16 (G key/value heads of head dim D), and one chunk's activations.

    Raises:
        ModelError: the model cannot be computed by chunks.
    """
    step = ChunkedStep(model, chunk_tokens, arena=arena or KvArena())
    shard = step.lay_out(batch.num_tokens).shard(batch, 0)
    return step.forward_only(losses_of(model, tile_tokens), shard)


def losses_of(model: PreTrainedModel, tile_tokens: int) -> Callable[[ShardedBatch, ChunkAttention], Tensor]:
    """The evaluation of one chunk: its losses_t, with the logits of `tile_tokens` tokens at a time."""
    _, head = trunk_and_head(model)
    rule = HeadRule(head.factor, head.softcap, ignored=IGNORED_LABEL)

    def losses(chunk: ShardedBatch, attention: ChunkAttention) -> Tensor:
        hidden_tE = packed_hidden(model, chunk.tokens_T, chunk.positions_T, attention, None)
        if head.plain is not None:
            weight_VE, bias_V = head.plain.weight, head.plain.bias
            return linear_cross_entropy(
                hidden_tE, weight_VE, chunk.labels_T, tile_tokens=tile_tokens, bias_V=bias_V, rule=rule
            )
        tiles = zip(hidden_tE.split(tile_tokens), chunk.labels_T.split(tile_tokens), strict=True)
        return torch.cat([losses_of_logits(head.linear(tile), labels, rule) for tile, labels in tiles])

    return losses
