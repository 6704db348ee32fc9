"""A bf16 linear layer on a CPU: a chain of one step. Contract: contract.py.

Without bf16 arithmetic torch widens the weights of every call into memory first, and computes several times slower than
in fp32; with it, torch lays the weights of every call out anew.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from farspan.kernels.chain.contract import BindChain, Multiply
from farspan.kernels.chain.native import load_native as load_chain
from farspan.kernels.linear.contract import BindLinear, Linear, check_linear


@cache
def load_native() -> BindLinear:
    """The kernel, compiled now if this machine has not done it before. Raises ImportError where it cannot be made."""
    bind = load_chain()
    return lambda w_NK, b_N: _bind(bind, w_NK, b_N)


def _bind(bind: BindChain, w_NK: Tensor, b_N: Tensor | None) -> Linear:
    assert w_NK.dtype == torch.bfloat16, f"not compiled for {w_NK.dtype}"
    bias = None if b_N is None else b_N.contiguous()
    chain = bind([Multiply("x", "y", w_NK, bias)], {"x": w_NK.shape[1]}, ["y"])

    def linear_native(x_TK: Tensor) -> Tensor:
        check_linear(x_TK, w_NK, bias)
        return chain(x_TK if x_TK.stride(1) == 1 else x_TK.contiguous())[0]

    return linear_native
