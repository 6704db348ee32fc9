"""What each backend over pages cannot compute: plain values, no tensors. attention/limits.py decides."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from farspan.kernels.attention.limits import Limits

# The best first: the first that computes a case and is installed gets it.
BACKENDS: Mapping[str, Limits] = {
    "triton": Limits("cuda"),
    "native": Limits("cpu", (torch.float32, torch.bfloat16), largest_head_dim=512),
    "gathered": Limits("cpu"),
    "reference": Limits(),
}
