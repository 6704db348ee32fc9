"""A packed batch of random documents, and its gradients by plain transformers, one document at a time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from farspan.batch import IGNORED_LABEL, PackedBatch


def random_batch(bounds: Sequence[int], vocab_size: int, seed: int = 0) -> PackedBatch:
    """Documents at `bounds`; the labels of every fifth token are left out."""
    generator = torch.Generator().manual_seed(seed)
    tokens_T = torch.randint(vocab_size, (bounds[-1],), generator=generator)
    labels_T = tokens_T.roll(-1)
    labels_T[[stop - 1 for stop in bounds[1:]]] = IGNORED_LABEL
    labels_T[::5] = IGNORED_LABEL
    positions_T = torch.cat([torch.arange(stop - start) for start, stop in pairwise(bounds)])
    return PackedBatch(tokens_T, labels_T, positions_T, tuple(bounds), (0,))


def token_losses_by_transformers(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """loss_T, by the model's own forward and attention."""
    logits = [
        model(input_ids=batch.tokens_T[start:stop].unsqueeze(0), use_cache=False).logits[0]
        for start, stop in pairwise(batch.bounds)
    ]
    return nn.functional.cross_entropy(torch.cat(logits), batch.labels_T, ignore_index=IGNORED_LABEL, reduction="none")


def gradients_by_transformers(model: PreTrainedModel, batch: PackedBatch) -> tuple[float, dict[str, Tensor]]:
    """(mean loss, every gradient that is wanted)."""
    model.zero_grad(set_to_none=True)
    loss = token_losses_by_transformers(model, batch).sum() / num_labels(batch)
    loss.backward()
    return loss.item(), taken_gradients(model)


def num_labels(batch: PackedBatch) -> Tensor:
    return (batch.labels_T != IGNORED_LABEL).sum()


def taken_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of `model` by name, which then has none."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
