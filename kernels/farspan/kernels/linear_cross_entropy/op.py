"""Fused linear head and cross entropy as one differentiable operation. Contract and letters: contract.py."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.linear_cross_entropy.contract import HeadRule
from farspan.kernels.linear_cross_entropy.tiled import tiled_backward, tiled_forward

_PLAIN = HeadRule()


def linear_cross_entropy(
    hidden_TE: Tensor,
    weight_VE: Tensor,
    labels_T: Tensor,
    *,
    tile_tokens: int,
    bias_V: Tensor | None = None,
    rule: HeadRule = _PLAIN,
) -> Tensor:
    """loss_T of every token, fp32 (fp64 for fp64 inputs); logits of `tile_tokens` tokens exist at a time.

    Exact for every gradient of loss_T: weights per token, a sum, a mean over any count. Gradients come back in the
    types of their inputs, once per backward.
    """
    assert tile_tokens >= 1, "a tile holds at least one token"
    return cast(Tensor, _LinearCrossEntropy.apply(hidden_TE, weight_VE, bias_V, labels_T, rule, tile_tokens))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TE: Tensor,
        weight_VE: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        rule: HeadRule,
        tile_tokens: int,
    ) -> Tensor:
        loss_T, lse_T, last = tiled_forward(hidden_TE, weight_VE, bias_V, labels_T, rule, tile_tokens)
        # The weight is kept as it came, as a linear layer does: what frees it between forward and backward
        # (FSDP, ZeRO) brings it back into the same tensor.
        ctx.save_for_backward(hidden_TE, weight_VE, bias_V, labels_T, lse_T)
        ctx.rule, ctx.tile_tokens = rule, tile_tokens
        # Not saved for backward: it is nobody's input, and offload would send it away for the moment until it is used.
        ctx.last = [] if last is None else [last]
        return loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TE, weight_VE, bias_V, labels_T, lse_T = ctx.saved_tensors
        found = tiled_backward(
            grads[0],
            hidden_TE,
            weight_VE,
            bias_V,
            labels_T,
            lse_T,
            ctx.rule,
            ctx.tile_tokens,
            wanted=ctx.needs_input_grad[:3],
            last=ctx.last,
        )
        inputs = (hidden_TE, weight_VE, bias_V)
        narrow = (None if g is None or x is None else g.to(x.dtype) for g, x in zip(found, inputs, strict=True))
        return *narrow, None, None, None
