"""Partial attention on CPU through torch's fused kernel, which also returns the log-sum-exp.

The kernel knows two masks, none and lower-triangular, so a band is cut into such pieces (pieces.py), merged in fp32 or
wider. Head dims of q and v that differ are padded with zeros, which changes no score and no output; a soft cap, which
the kernel does not have, goes to tiled.py. Nothing of size T x S is ever held.

Contract and letters: contract.py; N query heads per key/value head (H = G * N), R equal pieces of Q queries and
K keys, B = R * G.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from farspan.kernels.attention.contract import check_pair
from farspan.kernels.attention.pieces import Kind, Piece, cut_band
from farspan.kernels.attention.tiled import attend_tiled, attend_tiled_backward

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
    if softcap is not None:
        return attend_tiled(q_THD, k_SGD, v_SGC, scale=scale, offset=offset, window=window, softcap=softcap)
    num_tokens, num_heads, v_dim = *q_THD.shape[:2], v_SGC.shape[2]
    pieces = cut_band(num_tokens, k_SGD.shape[0], offset, window)
    q, k, v = _same_dim(q_THD, k_SGD, v_SGC)
    if len(pieces) == 1 and pieces[0].num_queries == num_tokens:
        out_RQHD, lse_RQH = _forward(q, k, v, scale, pieces[0])
        return out_RQHD[0, ..., :v_dim], lse_RQH[0].contiguous()
    wide = _wide(q_THD)
    out_THC = torch.zeros(num_tokens, num_heads, v.shape[2], dtype=wide)
    lse_TH = torch.full((num_tokens, num_heads), float("-inf"), dtype=wide)
    for piece in pieces:
        _merge(_queries(out_THC, piece), _queries(lse_TH, piece), *_forward(q, k, v, scale, piece))
    return out_THC[..., :v_dim].to(q_THD.dtype), lse_TH


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
    if softcap is not None:
        return attend_tiled_backward(
            dout_THC, q_THD, k_SGD, v_SGC, out_THC, lse_TH, scale=scale, offset=offset, window=window, softcap=softcap
        )
    qk_dim, v_dim = q_THD.shape[2], v_SGC.shape[2]
    pieces = cut_band(q_THD.shape[0], k_SGD.shape[0], offset, window)
    dout, out, q, k, v = _same_dim(dout_THC, out_THC, q_THD, k_SGD, v_SGC)
    if len(pieces) == 1 and (pieces[0].num_queries, pieces[0].num_keys) == (q.shape[0], k.shape[0]):
        sums = [x[0] for x in _backward(dout, q, k, v, out, lse_TH, scale, pieces[0])]
    else:
        # Zeros where no piece reaches: keys nobody sees and queries that see nothing have no gradient.
        sums = [torch.zeros(x.shape, dtype=_wide(x)) for x in (q, k, v)]
        for piece in pieces:
            dq_RQHD, dk_RKGD, dv_RKGD = _backward(dout, q, k, v, out, lse_TH, scale, piece)
            _queries(sums[0], piece).add_(dq_RQHD)
            _keys(sums[1], piece).add_(dk_RKGD)
            _keys(sums[2], piece).add_(dv_RKGD)
    dims = (qk_dim, qk_dim, v_dim)
    dq, dk, dv = (x[..., :dim].to(q_THD.dtype) for x, dim in zip(sums, dims, strict=True))
    return dq, dk, dv


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, piece: Piece) -> tuple[Tensor, Tensor]:
    """(out_RQHD, lse_RQH) of a piece."""
    num_groups, group, causal = *_grouping(q, k), piece.kind is not Kind.FULL
    q_BNQD = _by_group(_queries(q, piece), num_groups, piece)
    k_BNKD, v_BNKD = (_shared(_keys(x, piece), group, piece) for x in (k, v))
    out_BNQD, lse_BNQ = _FORWARD(q_BNQD, k_BNKD, v_BNKD, 0.0, causal, scale=scale)
    return _packed(out_BNQD, num_groups, piece), _packed(lse_BNQ.unsqueeze(-1), num_groups, piece).squeeze(-1)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse_TH: Tensor, scale: float, piece: Piece
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq_RQHD, dk_RKGD, dv_RKGD) of a piece; dk and dv in fp32 or wider where heads were summed."""
    num_groups, group, causal = *_grouping(q, k), piece.kind is not Kind.FULL
    dout_BNQD, q_BNQD, out_BNQD = (_by_group(_queries(x, piece), num_groups, piece) for x in (dout, q, out))
    lse_BNQ = _by_group(_queries(lse_TH.unsqueeze(-1), piece), num_groups, piece).squeeze(-1)
    k_BNKD, v_BNKD = (_shared(_keys(x, piece), group, piece) for x in (k, v))
    dq_BNQD, dk_BNKD, dv_BNKD = _BACKWARD(
        dout_BNQD, q_BNQD, k_BNKD, v_BNKD, out_BNQD, lse_BNQ.contiguous(), 0.0, causal, scale=scale
    )
    if group > 1:
        dk_BNKD, dv_BNKD = (x.sum(1, True, dtype=_wide(x)) for x in (dk_BNKD, dv_BNKD))
    dk_RKGD, dv_RKGD = (_packed(x, num_groups, piece) for x in (dk_BNKD, dv_BNKD))
    return _packed(dq_BNQD, num_groups, piece), dk_RKGD, dv_RKGD


def _grouping(q_THD: Tensor, k_SGD: Tensor) -> tuple[int, int]:
    """(G, N). Where no heads share keys all are one batch's: results then lie in the order of the sequence."""
    num_heads, num_groups = q_THD.shape[1], k_SGD.shape[1]
    return (1, 1) if num_heads == num_groups else (num_groups, num_heads // num_groups)


def _merge(out_RQHC: Tensor, lse_RQH: Tensor, part_RQHC: Tensor, part_lse_RQH: Tensor) -> None:
    """Merge a part into (out, lse) in place. Every row of the part saw a key: its lse is finite."""
    merged_RQH = torch.logaddexp(lse_RQH, part_lse_RQH)
    out_RQHC.mul_((lse_RQH - merged_RQH).exp_().unsqueeze(-1))
    out_RQHC.addcmul_(part_RQHC.to(out_RQHC.dtype), (part_lse_RQH - merged_RQH).exp_().unsqueeze(-1))
    lse_RQH.copy_(merged_RQH)


def _queries(x_THD: Tensor, piece: Piece) -> Tensor:
    return _cut(x_THD, piece.query, piece.num_queries, piece)


def _keys(x_SGD: Tensor, piece: Piece) -> Tensor:
    return _cut(x_SGD, piece.key, piece.num_keys, piece)


def _cut(x: Tensor, start: int, length: int, piece: Piece) -> Tensor:
    """View [R, length, ...] of the rows of a piece; blocks of a batch may lie closer than `length` to the end."""
    row = x.stride(0)
    sizes, strides = (piece.repeat, length, *x.shape[1:]), (piece.step * row, *x.stride())
    return x.as_strided(sizes, strides, x.storage_offset() + start * row)


def _by_group(x_RQHD: Tensor, num_groups: int, piece: Piece) -> Tensor:
    """[R, Q, H, D] -> [R * G, N, Q, D], a view unless blocks are batched or reversed."""
    return _ordered(x_RQHD, piece).unflatten(2, (num_groups, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)


def _shared(x_RKGD: Tensor, group: int, piece: Piece) -> Tensor:
    """[R, K, G, D] -> [R * G, N, K, D]: the kernel reads through strides, so a group's shared keys are not repeated."""
    if group == 1:
        return _ordered(x_RKGD, piece).transpose(1, 2)
    return _ordered(x_RKGD, piece).transpose(1, 2).flatten(0, 1).unsqueeze(1).expand(-1, group, -1, -1)


def _packed(x_BNQD: Tensor, num_groups: int, piece: Piece) -> Tensor:
    """[R * G, N, Q, D] -> [R, Q, G * N, D], in the order of the sequence."""
    return _ordered(x_BNQD.unflatten(0, (-1, num_groups)).permute(0, 3, 1, 2, 4).flatten(2, 3), piece)


def _ordered(x_RQHD: Tensor, piece: Piece) -> Tensor:
    return x_RQHD.flip(1) if piece.kind is Kind.FLIPPED else x_RQHD


def _same_dim(*tensors: Tensor) -> list[Tensor]:
    """The tensors with one head dim, zeros added where it is short, and with head dims contiguous in memory."""
    dim = max(x.shape[-1] for x in tensors)
    padded = (pad(x, (0, dim - x.shape[-1])) if x.shape[-1] < dim else x for x in tensors)
    # The kernel steps through a head by one element and never asks.
    return [x if x.stride(-1) == 1 else x.contiguous() for x in padded]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
