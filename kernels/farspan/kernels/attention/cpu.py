"""Partial attention on the CPU: torch's fused flash kernel, which returns and accepts the log-sum-exp.

Contract and letters: contract.py; N query heads per key/value head (H = G * N).
The fused kernel knows full and square diagonal pairs with one head dim; other pairs go to the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farspan.kernels.attention.contract import check_pair
from farspan.kernels.attention.reference import attend_reference, attend_reference_backward

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_cpu(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGC: Tensor,
    *,
    scale: float,
    offset: int | None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    check_pair(q_THD, k_SGD, v_SGC, offset, window)
    if not _fused(q_THD, k_SGD, v_SGC, offset, window, softcap):
        return attend_reference(q_THD, k_SGD, v_SGC, scale=scale, offset=offset, window=window, softcap=softcap)
    num_groups = k_SGD.shape[1]
    group = q_THD.shape[1] // num_groups
    out_GNTC, lse_GNT = _FORWARD(
        _by_group(q_THD, num_groups), _shared(k_SGD, group), _shared(v_SGC, group), 0.0, offset is not None, scale=scale
    )
    return _packed(out_GNTC), lse_GNT.flatten(0, 1).transpose(0, 1)


def attend_cpu_backward(
    dout_THC: Tensor,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGC: Tensor,
    out_THC: Tensor,
    lse_TH: Tensor,
    *,
    scale: float,
    offset: int | None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_pair(q_THD, k_SGD, v_SGC, offset, window)
    if not _fused(q_THD, k_SGD, v_SGC, offset, window, softcap):
        return attend_reference_backward(
            dout_THC, q_THD, k_SGD, v_SGC, out_THC, lse_TH, scale=scale, offset=offset, window=window, softcap=softcap
        )
    num_groups = k_SGD.shape[1]
    group = q_THD.shape[1] // num_groups
    dq_GNTD, dk_GNSD, dv_GNSC = _BACKWARD(
        _by_group(dout_THC, num_groups),
        _by_group(q_THD, num_groups),
        _shared(k_SGD, group),
        _shared(v_SGC, group),
        _by_group(out_THC, num_groups),
        lse_TH.transpose(0, 1).unflatten(0, (num_groups, group)),
        0.0,
        offset is not None,
        scale=scale,
    )
    return _packed(dq_GNTD), _summed(dk_GNSD), _summed(dv_GNSC)


def _fused(
    q_THD: Tensor, k_SGD: Tensor, v_SGC: Tensor, offset: int | None, window: int | None, softcap: float | None
) -> bool:
    """Whether the fused kernel computes this pair: full, or the square diagonal."""
    square = offset is None or (offset == 0 and q_THD.shape[0] == k_SGD.shape[0])
    return square and window is None and softcap is None and q_THD.shape[2] == v_SGC.shape[2]


def _by_group(x_THD: Tensor, num_groups: int) -> Tensor:
    return x_THD.unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3)


def _shared(x_SGD: Tensor, group: int) -> Tensor:
    # The kernel reads through strides: the key heads a group of queries shares are never copied.
    return x_SGD.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)


def _packed(x_GNTD: Tensor) -> Tensor:
    return x_GNTD.permute(2, 0, 1, 3).flatten(1, 2)


def _summed(x_GNSD: Tensor) -> Tensor:
    # Summed wide: a bf16 sum over a group of heads would lose bits that the kernel kept.
    wide = torch.promote_types(x_GNSD.dtype, torch.float32)
    return x_GNSD.sum(1, dtype=wide).to(x_GNSD.dtype).transpose(0, 1)
