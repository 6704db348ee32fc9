"""Root-mean-square normalization in plain torch. Contract and letters: contract.py."""

from __future__ import annotations

import torch
from torch import Tensor

from farspan.kernels.rms_norm.contract import Kind, RmsNorm


def bind_rms_norm_reference(w_K: Tensor, eps: float, kind: Kind) -> RmsNorm:
    def rms_norm_reference(x_TK: Tensor) -> Tensor:
        wide_TK = x_TK.to(torch.promote_types(x_TK.dtype, torch.float32))
        n_TK = wide_TK * torch.rsqrt(wide_TK.pow(2).mean(-1, keepdim=True) + eps)
        if kind is Kind.SCALED:
            return w_K * n_TK.to(x_TK.dtype)
        return (n_TK * (1.0 + w_K.to(wide_TK.dtype))).to(x_TK.dtype)

    return rms_norm_reference
