"""The other side of every comparison: transformers alone, in one process, one document at a time.

Shapes: T tokens of a sequence, V vocabulary, S keys.

transformers' eager attention takes its softmax in fp32 whatever the model's type, which would hide errors below 1e-7.
The reference therefore registers the same attention with the softmax in the model's own type; masks, windows, soft
caps and everything else stay transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from farspan.verify.cases import Case, ProbeSequence

_NAME = "farspan_reference"


@dataclass(frozen=True)
class StepAnswer:
    """One optimizer step: its loss and every gradient, by the model's own names."""

    loss: float
    gradients: dict[str, Tensor]


def use_reference_attention(model: PreTrainedModel) -> None:
    """Switch `model` to transformers' eager attention in full width."""
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, eager_mask)
    model.set_attn_implementation(_NAME)


def reference_logits(model: PreTrainedModel, sequence: ProbeSequence) -> Tensor:
    """logits_TV, every document by itself."""
    tokens_T = sequence.tokens(_vocab(model))
    documents = [tokens_T[a:b].unsqueeze(0) for a, b in pairwise(sequence.bounds)]
    return torch.cat([model(input_ids=tokens, use_cache=False).logits[0] for tokens in documents])


def reference_step(model: PreTrainedModel, case: Case) -> StepAnswer:
    """Mean next-token loss over all labels of the step, and its gradients."""
    losses = [_document_losses(model, sequence) for sequence in case.sequences]
    num_labels = sum(count for _, count in losses)
    total = torch.stack([loss for loss, _ in losses]).sum() / num_labels
    model.zero_grad(set_to_none=True)
    total.backward()
    return StepAnswer(total.item(), whole_gradients(model.named_parameters()))


def rounding(model: PreTrainedModel, sequence: ProbeSequence) -> float:
    """How much gradients of the plain process differ from themselves when their sums run in another order.

    Every document is computed once, and as two equal rows that count half. In fp64 it is 1e-15; transformers computes
    some norms and states in fp32 whatever the model's type, and there it is what fp32 sums are worth.
    """
    once, twice = (_row_gradients(model, sequence, rows) for rows in (1, 2))
    return gradient_error(twice, once)[0]


def gradient_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """(largest relative error of a weight's gradient, that weight)."""
    # Some gradients are zero in exact arithmetic (a key bias without rotation): they are held on the model's scale.
    floor = 1e-3 * max(float(g.abs().max()) for g in want.values())
    errors = {n: float((got[n] - g).abs().max()) / max(float(g.abs().max()), floor) for n, g in want.items()}
    worst = max(errors, key=lambda n: errors[n] if errors[n] == errors[n] else float("inf"))
    return errors[worst], worst


def whole_gradients(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Gradients by name; a weight nothing reached has zeros."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for n, p in parameters}


def _document_losses(model: PreTrainedModel, sequence: ProbeSequence) -> tuple[Tensor, int]:
    """(summed loss, number of labels) of a sequence; labels are shifted here, apart from training's own shift."""
    tokens_T = sequence.tokens(_vocab(model))
    logits_TV = reference_logits(model, sequence)
    masked = set(sequence.masked)
    taught = [t for a, b in pairwise(sequence.bounds) for t in range(a, b - 1) if t not in masked]
    if not taught:
        return logits_TV.sum() * 0.0, 0
    at = torch.tensor(taught)
    return nn.functional.cross_entropy(logits_TV[at], tokens_T[at + 1], reduction="sum"), len(taught)


def _row_gradients(model: PreTrainedModel, sequence: ProbeSequence, rows: int) -> dict[str, Tensor]:
    tokens_T = sequence.tokens(_vocab(model))
    model.zero_grad(set_to_none=True)
    for a, b in pairwise(sequence.bounds):
        tokens = tokens_T[a:b].expand(rows, -1)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
        (nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum") / rows).backward()
    return whole_gradients(model.named_parameters())


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    assert dropout == 0.0, "the reference drops nothing"
    copies = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    assert attention_mask is not None, "transformers gives an eager attention its mask"
    scores = scores + attention_mask[:, :, :, : key.shape[2]]
    probs = scores.softmax(-1)
    if s_aux is not None:
        # A sink is one more column of scores, whose value is nothing.
        column = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        probs = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    return (probs @ value).transpose(1, 2).contiguous(), None


def _vocab(model: PreTrainedModel) -> int:
    size: int = model.config.get_text_config(decoder=True).vocab_size
    return size
