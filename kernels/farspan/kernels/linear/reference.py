"""A linear layer in plain torch. Contract and letters: contract.py."""

from __future__ import annotations

import torch
from torch import Tensor

from farspan.kernels.linear.contract import Linear, check_linear


def bind_linear_reference(w_NK: Tensor, b_N: Tensor | None) -> Linear:
    wide = torch.promote_types(w_NK.dtype, torch.float32)

    def linear_reference(x_TK: Tensor) -> Tensor:
        check_linear(x_TK, w_NK, b_N)
        y_TN = x_TK.to(wide) @ w_NK.to(wide).T
        return (y_TN if b_N is None else y_TN + b_N.to(wide)).to(x_TK.dtype)

    return linear_reference
