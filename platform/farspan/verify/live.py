"""The plain side of a probe on a running training: its own weights, one process, transformers alone.

Shapes: T tokens of the probe, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from farspan.models.parts import decoder_layers, trunk_and_head
from farspan.models.rules import layer_kinds
from farspan.verify.cases import ProbeSequence, document_of
from farspan.verify.judge import Check, relative
from farspan.verify.reference import gradient_error, use_reference_attention

# How much of what the compute type alone costs the plain process may differ, and the least that is ever allowed:
# sums over shards and other kernels run in another order.
_TIMES_OWN = 8.0
_LEAST = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class LiveAnswer:
    """One packed sequence: its loss, the linear head's results [T, V] in global order, some gradients."""

    loss: float
    head_TV: Tensor
    gradients: dict[str, Tensor]


class HeadWatch:
    """What the linear head of a model makes of the hidden states of each forward, forwards laid end to end.

    Training computes the head and its loss as one operation by tiles, so the trunk is what is watched; the head is
    computed there, where sharded weights are whole.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._trunk, head = trunk_and_head(model)
        self._linear, self._forwards = head.linear, list[Tensor]()

    def __enter__(self) -> HeadWatch:
        self._handle = self._trunk.register_forward_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    @torch.no_grad()
    def _keep(self, _module: nn.Module, _args: object, output: BaseModelOutput) -> None:
        self._forwards.append(self._linear(output.last_hidden_state.detach()).flatten(0, -2))

    def rows(self) -> Tensor:
        return torch.cat(self._forwards)


def probed_weights(model: PreTrainedModel) -> list[str]:
    """Names of the weights whose gradients are compared: those of the first layer of every kind."""
    kinds, layers = layer_kinds(model.config), decoder_layers(model)
    first = {id(layers[kinds.index(kind)]) for kind in set(kinds)}
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if id(module) in first)
    return [name for name, _ in model.named_parameters() if name.startswith(prefixes)]


@dataclass(frozen=True, slots=True)
class Objective:
    """What a run adds to the likelihood of its labels: a probe compares it with the same."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0


def plain_answers(
    model: PreTrainedModel,
    sequence: ProbeSequence,
    names: Iterable[str],
    compute: torch.dtype,
    objective: Objective,
) -> tuple[LiveAnswer, LiveAnswer]:
    """(in the type weights are kept in, in the compute type). `model` is used up: it ends in the compute type."""
    use_reference_attention(model)
    model.eval().requires_grad_(False)
    if model._can_set_experts_implementation():
        # The grouped kernel knows no fp64.
        model.set_experts_implementation("eager")
    for name in names:
        model.get_parameter(name).requires_grad_()
    exact = _answer(model, sequence, objective)
    for weight in model.parameters():
        # As sharded weights are cast: buffers (rotary frequencies) stay as wide as they are.
        weight.data = weight.data.to(compute)
    return exact, _answer(model, sequence, objective)


def judge_live(got: LiveAnswer, exact: LiveAnswer, own: LiveAnswer, compute: torch.dtype) -> list[Check]:
    """The sharded answer against the plain one; `own` is the plain process in the compute type."""
    least = _LEAST[compute]

    def check(name: str, error: float, own_error: float, about: str = "") -> Check:
        return Check(name, error, max(least, _TIMES_OWN * own_error), about)

    gradients, worst = gradient_error(got.gradients, exact.gradients)
    return [
        check("logits", relative(got.head_TV, exact.head_TV), relative(own.head_TV, exact.head_TV)),
        check("loss", abs(got.loss - exact.loss) / abs(exact.loss), abs(own.loss - exact.loss) / abs(exact.loss)),
        check("gradients", gradients, gradient_error(own.gradients, exact.gradients)[0], worst),
    ]


def judge_leaks(
    sequence: ProbeSequence, before_TV: Tensor, after: dict[int, Tensor], compute: torch.dtype
) -> list[Check]:
    """What one changed token changes: nothing outside its document or before it, and something in its place."""
    changed, unseen = 0, 0
    # Other positions are computed from the same numbers: only experts may group them otherwise.
    moved_at_least = _LEAST[compute] * 1e-1 * float(before_TV.abs().max())
    for at, after_TV in after.items():
        _, end = document_of(sequence.bounds, at)
        moved_T = ~((after_TV - before_TV).abs().amax(-1) <= moved_at_least)
        unseen += int(torch.equal(after_TV[at], before_TV[at]))
        changed += int(moved_T[:at].sum() + moved_T[end:].sum())
    return [
        Check("positions changed by a token they must not see", changed, 0),
        Check("changed tokens that change nothing in their place", unseen, 0),
    ]


def _answer(model: PreTrainedModel, sequence: ProbeSequence, objective: Objective) -> LiveAnswer:
    tokens_T = sequence.tokens(model.config.get_text_config(decoder=True).vocab_size)
    model.zero_grad(set_to_none=True)
    num_labels = sum(b - a - 1 for a, b in pairwise(sequence.bounds))
    loss = 0.0
    with HeadWatch(model) as head:
        for a, b in pairwise(sequence.bounds):
            logits = model(input_ids=tokens_T[a:b].unsqueeze(0), use_cache=False).logits[0, :-1]
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            part = _summed_loss(wide, tokens_T[a + 1 : b], objective) / num_labels
            loss += part.item()
            if b - a > 1:
                part.backward()
    gradients = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    return LiveAnswer(loss, head.rows().double(), gradients)


def _summed_loss(logits_TV: Tensor, labels_T: Tensor, objective: Objective) -> Tensor:
    loss = nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum", label_smoothing=objective.label_smoothing)
    return loss + objective.z_loss * logits_TV.logsumexp(-1).square().sum()
