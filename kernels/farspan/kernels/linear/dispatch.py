"""Choose how linear layers are computed: where chains are by the compiled kernel, else by torch (None)."""

from __future__ import annotations

import torch

from farspan.kernels.chain.dispatch import choose_chain
from farspan.kernels.linear.contract import BindLinear
from farspan.kernels.linear.native import load_native


def choose_linear(device_type: str, dtype: torch.dtype) -> BindLinear | None:
    """What computes a linear layer faster than torch here; None: nothing does.

    Choosing may compile the kernel, once per machine and for seconds.
    """
    return load_native() if device_type == "cpu" and choose_chain(device_type, dtype) is not None else None
