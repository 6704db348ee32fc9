"""Partial attention in plain torch: the ground truth. Contract and letters: contract.py. Materialises T x S scores."""

from __future__ import annotations

import torch
from torch import Tensor

from farspan.kernels.attention.contract import check_pair


def attend_reference(
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
    scores_HTS, _ = _scores(q_THD, k_SGD, scale, offset, window, softcap)
    lse_HT = scores_HTS.logsumexp(-1)
    v_HSC = _per_query_head(v_SGC, q_THD.shape[1]).to(scores_HTS.dtype)
    out_HTC = _probs(scores_HTS, lse_HT) @ v_HSC
    return out_HTC.transpose(0, 1).to(q_THD.dtype), lse_HT.transpose(0, 1).contiguous()


def attend_reference_backward(
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
    num_q_heads, num_kv_heads = q_THD.shape[1], k_SGD.shape[1]
    scores_HTS, slope_HTS = _scores(q_THD, k_SGD, scale, offset, window, softcap)
    probs_HTS = _probs(scores_HTS, lse_TH.transpose(0, 1))
    wide = probs_HTS.dtype
    dout_HTC, out_HTC = dout_THC.transpose(0, 1).to(wide), out_THC.transpose(0, 1).to(wide)
    v_HSC = _per_query_head(v_SGC, num_q_heads).to(wide)
    k_HSD = _per_query_head(k_SGD, num_q_heads).to(wide)
    delta_HT1 = (dout_HTC * out_HTC).sum(-1, keepdim=True)
    dscores_HTS = probs_HTS * (dout_HTC @ v_HSC.transpose(1, 2) - delta_HT1) * slope_HTS * scale
    dq_HTD = dscores_HTS @ k_HSD
    dk_HSD = dscores_HTS.transpose(1, 2) @ q_THD.transpose(0, 1).to(wide)
    dv_HSC = probs_HTS.transpose(1, 2) @ dout_HTC
    return (
        dq_HTD.transpose(0, 1).to(q_THD.dtype),
        _per_kv_head(dk_HSD, num_kv_heads).to(k_SGD.dtype),
        _per_kv_head(dv_HSC, num_kv_heads).to(v_SGC.dtype),
    )


def _scores(
    q_THD: Tensor, k_SGD: Tensor, scale: float, offset: int | None, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(scores as the softmax sees them, derivative of the soft cap at each)."""
    wide = torch.float64 if q_THD.dtype == torch.float64 else torch.float32
    q_HTD = q_THD.transpose(0, 1).to(wide)
    k_HSD = _per_query_head(k_SGD, q_THD.shape[1]).to(wide)
    scores_HTS = q_HTD @ k_HSD.transpose(1, 2) * scale
    slope_HTS = torch.ones((), dtype=wide, device=q_THD.device)
    if softcap is not None:
        bent_HTS = (scores_HTS / softcap).tanh()
        scores_HTS, slope_HTS = softcap * bent_HTS, 1 - bent_HTS * bent_HTS
    if offset is not None:
        hidden_TS = ~visible(q_THD.shape[0], k_SGD.shape[0], offset, window, q_THD.device)
        scores_HTS = scores_HTS.masked_fill(hidden_TS, float("-inf"))
    return scores_HTS, slope_HTS


def visible(num_queries: int, num_keys: int, offset: int, window: int | None, device: torch.device) -> Tensor:
    """visible_TS: the keys each query of a pair sees, written out."""
    behind_TS = torch.arange(num_queries, device=device)[:, None] + offset - torch.arange(num_keys, device=device)
    return (behind_TS >= 0) if window is None else (behind_TS >= 0) & (behind_TS < window)


def _probs(scores_HTS: Tensor, lse_HT: Tensor) -> Tensor:
    # A query that sees no key has lse -inf: its probabilities are zero, not NaN.
    pivot_HT = torch.where(torch.isinf(lse_HT), torch.zeros_like(lse_HT), lse_HT)
    return (scores_HTS - pivot_HT.unsqueeze(-1)).exp()


def _per_query_head(x_SGD: Tensor, num_q_heads: int) -> Tensor:
    return x_SGD.transpose(0, 1).repeat_interleave(num_q_heads // x_SGD.shape[1], dim=0)


def _per_kv_head(x_HSD: Tensor, num_kv_heads: int) -> Tensor:
    return x_HSD.unflatten(0, (num_kv_heads, -1)).sum(1).transpose(0, 1)
