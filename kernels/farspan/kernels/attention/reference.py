"""Partial attention in plain torch: the ground truth. Contract and letters: contract.py. Materialises T x S scores."""

from __future__ import annotations

import torch
from torch import Tensor

from farspan.kernels.attention.contract import check_pair


def attend_reference(
    q_THD: Tensor, k_SGD: Tensor, v_SGC: Tensor, *, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    check_pair(q_THD, k_SGD, v_SGC, causal)
    scores_HTS = _scores(q_THD, k_SGD, scale, causal)
    lse_HT = scores_HTS.logsumexp(-1)
    v_HSC = _per_query_head(v_SGC, q_THD.shape[1]).to(scores_HTS.dtype)
    out_HTC = (scores_HTS - lse_HT.unsqueeze(-1)).exp() @ v_HSC
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
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_pair(q_THD, k_SGD, v_SGC, causal)
    num_q_heads, num_kv_heads = q_THD.shape[1], k_SGD.shape[1]
    probs_HTS = (_scores(q_THD, k_SGD, scale, causal) - lse_TH.transpose(0, 1).unsqueeze(-1)).exp()
    wide = probs_HTS.dtype
    dout_HTC, out_HTC = dout_THC.transpose(0, 1).to(wide), out_THC.transpose(0, 1).to(wide)
    v_HSC = _per_query_head(v_SGC, num_q_heads).to(wide)
    k_HSD = _per_query_head(k_SGD, num_q_heads).to(wide)
    delta_HT1 = (dout_HTC * out_HTC).sum(-1, keepdim=True)
    dscores_HTS = probs_HTS * (dout_HTC @ v_HSC.transpose(1, 2) - delta_HT1) * scale
    dq_HTD = dscores_HTS @ k_HSD
    dk_HSD = dscores_HTS.transpose(1, 2) @ q_THD.transpose(0, 1).to(wide)
    dv_HSC = probs_HTS.transpose(1, 2) @ dout_HTC
    return (
        dq_HTD.transpose(0, 1).to(q_THD.dtype),
        _per_kv_head(dk_HSD, num_kv_heads).to(k_SGD.dtype),
        _per_kv_head(dv_HSC, num_kv_heads).to(v_SGC.dtype),
    )


def _scores(q_THD: Tensor, k_SGD: Tensor, scale: float, causal: bool) -> Tensor:
    wide = torch.float64 if q_THD.dtype == torch.float64 else torch.float32
    q_HTD = q_THD.transpose(0, 1).to(wide)
    k_HSD = _per_query_head(k_SGD, q_THD.shape[1]).to(wide)
    scores_HTS = q_HTD @ k_HSD.transpose(1, 2) * scale
    if causal:
        later_TS = torch.ones(scores_HTS.shape[1:], dtype=torch.bool, device=q_THD.device).triu(1)
        scores_HTS = scores_HTS.masked_fill(later_TS, float("-inf"))
    return scores_HTS


def _per_query_head(x_SGD: Tensor, num_q_heads: int) -> Tensor:
    return x_SGD.transpose(0, 1).repeat_interleave(num_q_heads // x_SGD.shape[1], dim=0)


def _per_kv_head(x_HSD: Tensor, num_kv_heads: int) -> Tensor:
    return x_HSD.unflatten(0, (num_kv_heads, -1)).sum(1).transpose(0, 1)
