"""Angles of rotary positions in plain torch, in bf16. Contract and letters: contract.py."""

from __future__ import annotations

import torch
from torch import Tensor

from farspan.kernels.rotary.contract import Angles


def bind_angles_reference(inv_freq_F: Tensor, scale: float) -> Angles:
    def angles_reference(positions_T: Tensor) -> tuple[Tensor, Tensor]:
        angles_TF = positions_T[:, None].float() * inv_freq_F
        cos_TF, sin_TF = angles_TF.cos() * scale, angles_TF.sin() * scale
        return torch.cat((cos_TF, cos_TF), -1).bfloat16(), torch.cat((sin_TF, sin_TF), -1).bfloat16()

    return angles_reference
