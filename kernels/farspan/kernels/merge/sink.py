"""Attention sinks: one learned logit per query head that takes part in the softmax and has no value (gpt-oss).

Shapes: T query tokens, H query heads, C head dim of v.
A sink is one more key whose value is zero, so it is merged once, into the final (out, lse) of all keys. With the
(out, lse) that this gives, the block-wise backward is right as it is: probabilities are exp(score - lse), and
dout * out is the sum of dout * v over them, to which a value of zero adds nothing.
Source: the attention of gpt-oss (OpenAI 2025, https://arxiv.org/abs/2508.10925).
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_sinks(out_THC: Tensor, lse_TH: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) with the sinks in the softmax; a query that saw no key has out 0 and its sink as lse."""
    merged_TH = torch.logaddexp(lse_TH, sinks_H.to(lse_TH.dtype))
    return (out_THC * (lse_TH - merged_TH).exp().unsqueeze(-1)).to(out_THC.dtype), merged_TH


def sinks_gradient(dout_THC: Tensor, out_THC: Tensor, lse_TH: Tensor, sinks_H: Tensor) -> Tensor:
    """dsinks_H over the tokens given; out and lse are final, sinks included."""
    wide = lse_TH.dtype
    share_TH = (sinks_H.to(wide) - lse_TH).exp()
    return -(share_TH * (dout_THC.to(wide) * out_THC.to(wide)).sum(-1)).sum(0)
