"""Loss of a model on packed sequences of a corpus, in this process.

Shapes: T tokens of a sequence.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from farspan.batch import IGNORED_LABEL, PackedBatch
from farspan.data.reader import Reader, open_corpus
from farspan.models.attention import packed_hidden, use_farspan_attention
from farspan.models.checkpoint import load_causal_lm
from farspan.models.parts import trunk_and_head
from farspan.parallel.documents import attend_documents
from farspan.parallel.whole import WholeSequence
from farspan.storage.publish import fetch_folder

_TILE_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean loss in nats per token; `by_position` holds (first position, last position, mean loss, tokens)."""

    loss: float
    perplexity: float
    tokens: int
    by_position: tuple[tuple[int, int, float, int], ...]


@torch.no_grad()
def evaluate(
    model: str, corpus: str, sequences: int, sequence_tokens: int, seed: int, tell: Callable[[int], None]
) -> Evaluation:
    """Score `sequences` packed sequences in fp32; `tell` hears how many are done."""
    losses, positions = [], []
    with tempfile.TemporaryDirectory(prefix="farspan-evaluate-") as scratch:
        folder = fetch_folder(model, Path(scratch) / "model", require_manifest=False)
        network = load_causal_lm(folder, torch.float32)
        use_farspan_attention(network)
        reader = Reader(open_corpus(corpus, Path(scratch) / "corpus"), sequence_tokens, seed)
        for index in range(sequences):
            batch = reader.batch(index)
            scored = batch.labels_T != IGNORED_LABEL
            losses.append(torch.cat(list(_token_losses(network, batch)))[scored])
            positions.append(batch.positions_T[scored])
            tell(index + 1)
    return summarize(torch.cat(losses).double(), torch.cat(positions))


def summarize(loss_T: Tensor, position_T: Tensor) -> Evaluation:
    """Mean loss, and mean loss over position ranges that double: 0..63, 64..127, 128..255, ..."""
    rows, low, high = [], 0, 63
    while low <= int(position_T.max()):
        inside = (position_T >= low) & (position_T <= high)
        if inside.any():
            rows.append((low, high, loss_T[inside].mean().item(), int(inside.sum())))
        low, high = high + 1, high * 2 + 1
    mean = loss_T.mean().item()
    return Evaluation(mean, math.exp(min(mean, 700.0)), loss_T.numel(), tuple(rows))


def _token_losses(network: PreTrainedModel, batch: PackedBatch) -> Iterator[Tensor]:
    attention, whole = partial(attend_documents, bounds=batch.bounds), WholeSequence(batch.bounds)
    hidden_TE = packed_hidden(network, batch.tokens_T, batch.positions_T, attention, whole)
    _, head = trunk_and_head(network)
    for tile_TE, tile_T in zip(hidden_TE.split(_TILE_TOKENS), batch.labels_T.split(_TILE_TOKENS), strict=True):
        yield torch.nn.functional.cross_entropy(
            head(tile_TE).float(), tile_T, ignore_index=IGNORED_LABEL, reduction="none"
        )
