"""The loss in plain torch, with all logits at once: the ground truth, differentiable by autograd. See contract.py."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from farspan.kernels.linear_cross_entropy.contract import HeadRule, check_tensors, wide_dtype


def linear_cross_entropy_reference(
    hidden_TE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, labels_T: Tensor, rule: HeadRule
) -> Tensor:
    """loss_T."""
    check_tensors(hidden_TE, weight_VE, bias_V, labels_T)
    return losses_of_logits(linear(hidden_TE, weight_VE, bias_V), labels_T, rule)


def losses_of_logits(y_TV: Tensor, labels_T: Tensor, rule: HeadRule) -> Tensor:
    """loss_T of what the head gave, before factor and soft cap."""
    x_TV = y_TV.to(wide_dtype(y_TV.dtype)) * rule.factor
    if rule.softcap is not None:
        x_TV = (x_TV / rule.softcap).tanh() * rule.softcap
    loss_T = cross_entropy(
        x_TV, labels_T, ignore_index=rule.ignored, label_smoothing=rule.label_smoothing, reduction="none"
    )
    z_T = rule.z_loss * x_TV.logsumexp(-1).square()
    return loss_T + z_T.masked_fill(labels_T == rule.ignored, 0.0)
