"""What the processor of this machine can compute with."""

from __future__ import annotations

from functools import cache

import torch

_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16")


@cache
def has_bf16_arithmetic() -> bool:
    """Whether this processor multiplies bf16 numbers itself; where it does not, torch is several times slower in bf16
    than in fp32."""
    found = torch.cpu.get_capabilities()
    return any(bool(found.get(name)) for name in _INSTRUCTIONS)
