"""Flash-attention kernels for packed documents, written out in plain torch from their published description.

They stand for libraries that need a GPU: window (left, right) from the bottom right corner, lse [heads, tokens].
"""

from __future__ import annotations

import torch
from torch import Tensor


def scores_of(q_THD, k_SGD, cu_q, cu_k, scale, left, right, softcap):
    """(scores, slope of the soft cap), -inf where a query must not look; everything in fp64."""
    group = q_THD.shape[1] // k_SGD.shape[1]
    scores = torch.einsum("thd,shd->hts", q_THD.double(), k_SGD.double().repeat_interleave(group, 1)) * scale
    slope = torch.ones_like(scores)
    if softcap:
        bent = torch.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - bent * bent
    seen = torch.zeros(scores.shape[1:], dtype=torch.bool, device=scores.device)
    for n in range(len(cu_q) - 1):
        (a, b), (c, d) = (int(cu_q[n]), int(cu_q[n + 1])), (int(cu_k[n]), int(cu_k[n + 1]))
        t, s = (torch.arange(n, device=scores.device) for n in (b - a, d - c))
        t = t[:, None]
        at = t + (d - c) - (b - a)
        here = torch.ones(b - a, d - c, dtype=torch.bool, device=scores.device)
        if left >= 0:
            here &= s >= at - left
        if right >= 0:
            here &= s <= at + right
        seen[a:b, c:d] = here
    return scores.masked_fill(~seen, float("-inf")), slope


def flash_forward(q_THD, k_SGD, v_SGD, cu_q, cu_k, scale, left, right, softcap) -> tuple[Tensor, Tensor]:
    scores, _ = scores_of(q_THD, k_SGD, cu_q, cu_k, scale, left, right, softcap)
    lse_HT = scores.logsumexp(-1)
    v = v_SGD.double().repeat_interleave(q_THD.shape[1] // k_SGD.shape[1], 1)
    out = torch.einsum("hts,shd->thd", (scores - lse_HT[..., None]).exp(), v)
    return out.to(q_THD.dtype), lse_HT.float()


def flash_backward(
    dout, q, k, v, out, lse_HT, cu_q, cu_k, scale, left, right, softcap
) -> tuple[Tensor, Tensor, Tensor]:
    assert lse_HT.shape == (q.shape[1], q.shape[0])
    assert lse_HT.is_contiguous()
    assert lse_HT.dtype == torch.float32
    scores, slope = scores_of(q, k, cu_q, cu_k, scale, left, right, softcap)
    groups, group = k.shape[1], q.shape[1] // k.shape[1]
    probs = (scores - lse_HT.double()[..., None]).exp()
    delta = (dout.double() * out.double()).sum(-1).T[..., None]
    dprobs = torch.einsum("thd,shd->hts", dout.double(), v.double().repeat_interleave(group, 1))
    dscores = probs * (dprobs - delta) * slope * scale
    dq = torch.einsum("hts,shd->thd", dscores, k.double().repeat_interleave(group, 1))
    dk = torch.einsum("hts,thd->shd", dscores, q.double()).unflatten(1, (groups, group)).sum(2)
    dv = torch.einsum("hts,thd->shd", probs, dout.double()).unflatten(1, (groups, group)).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
