"""One rank's share of a model: weights cut in place, sums behind the layers that need them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from farspan.engine.cut_plan import CutPlan, plan_cuts
from farspan.engine.gang import Gang
from farspan.engine.probe import check_prompts, exact_experts, fingerprint_model, plain_logits


@dataclass(frozen=True, slots=True)
class Share:
    """What is known of the whole model by a rank that has a part of it."""

    gang: Gang
    fingerprint: str
    """Of the whole model: ranks, and engines of other degrees, have the same."""
    expected: tuple[Tensor, ...]
    """Logits [T, V] that transformers gives for the prompts of the trial."""

    @classmethod
    def of(cls, model: PreTrainedModel, gang: Gang) -> Share:
        """Cut a whole model, in place, to what this rank keeps. It may move to its device afterwards.

        Raises what `plan_cuts` raises.
        """
        plan = plan_cuts(model, gang.size)
        exact_experts(model)
        # Eager knows soft caps and sinks; where transformers' fused attention does not, it leaves them out.
        expected = tuple(plain_logits(model, prompt, "eager") for prompt in check_prompts(model))
        share = cls(gang, fingerprint_model(model), expected)
        cut(model, plan, gang)
        return share


def cut(model: PreTrainedModel, plan: CutPlan, gang: Gang) -> None:
    """Keep this rank's part of every weight that is cut, and let the ranks add up what belongs together."""
    for each in plan.cuts:
        owner, name = _place(model, each.weight)
        whole = getattr(owner, name)
        parts = [whole.detach().narrow(each.dim, r.start, len(r)) for r in each.kept(gang.rank, gang.size)]
        # A copy, also of one part: the whole weight is given back.
        setattr(owner, name, nn.Parameter(torch.cat(parts, each.dim).clone(), requires_grad=False))
    for path in plan.once:
        if not gang.leads:
            owner, name = _place(model, path)
            setattr(owner, name, None)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape

    def summed(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return gang.sum(output.contiguous())

    def joined(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return gang.join(output)

    for path in plan.summed:
        model.get_submodule(path).register_forward_hook(summed)
    if plan.gathered is not None:
        model.get_submodule(plan.gathered).register_forward_hook(joined)


def _place(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    owner, _, name = path.rpartition(".")
    return model.get_submodule(owner), name
