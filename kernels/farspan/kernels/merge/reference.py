"""Merge attention computed over disjoint key ranges.

Shapes: T query tokens, H query heads, C head dim of v.
`lse` is the log-sum-exp of the scaled scores, natural log; -inf where a query saw no key.
Source: the rescaling step of online softmax (Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867).
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_partials_reference(a_THC: Tensor, a_lse_TH: Tensor, b_THC: Tensor, b_lse_TH: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) over both ranges. Weights are computed in the type of lse (fp32, or fp64 for fp64 attention)."""
    lse_TH = torch.logaddexp(a_lse_TH, b_lse_TH)
    # A query that saw no key in either range has lse = -inf: its output is zero, not NaN.
    pivot_TH = torch.where(torch.isinf(lse_TH), torch.zeros_like(lse_TH), lse_TH)
    weight_a_TH1 = (a_lse_TH - pivot_TH).exp().unsqueeze(-1)
    weight_b_TH1 = (b_lse_TH - pivot_TH).exp().unsqueeze(-1)
    out_THC = weight_a_TH1 * a_THC.to(lse_TH.dtype) + weight_b_TH1 * b_THC.to(lse_TH.dtype)
    return out_THC.to(a_THC.dtype), lse_TH
