"""Causal attention inside each document of a packed sequence, with its backward.

Shapes: T tokens of the whole sequence, H query heads, G key/value heads, D head dim, N documents.
Documents never see each other because a pair is only ever computed inside one document: there is no mask to lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from farspan.kernels.attention.dispatch import choose_attention


def attend_documents(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    bounds: Sequence[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """out_THD of causal attention inside each document; `bounds` are the N + 1 offsets of the documents."""
    assert bounds[0] == 0, "documents start at token 0"
    assert bounds[-1] == q_THD.shape[0], "documents cover the sequence"
    rule = {"scale": scale, "window": window, "softcap": softcap}
    return cast(Tensor, _DocumentAttention.apply(q_THD, k_TGD, v_TGD, _chunked(bounds, chunk), rule))


def _chunked(bounds: Sequence[int], chunk: int | None) -> tuple[int, ...]:
    """Bounds of the chunks that see each other, counted from the first token of each document."""
    if chunk is None:
        return tuple(bounds)
    return (0, *(min(at + chunk, b) for a, b in pairwise(bounds) for at in range(a, b, chunk)))


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, bounds: tuple[int, ...], rule: dict[str, Any]
    ) -> Tensor:
        attend, _ = choose_attention(q_THD.device)
        parts = [attend(q_THD[a:b], k_TGD[a:b], v_TGD[a:b], offset=0, **rule) for a, b in pairwise(bounds) if b > a]
        out_THD = torch.cat([out for out, _ in parts])
        lse_TH = torch.cat([lse for _, lse in parts])
        ctx.save_for_backward(q_THD, k_TGD, v_TGD, out_THD, lse_TH)
        ctx.bounds, ctx.rule = bounds, rule
        return out_THD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dout_THD,) = grads
        q_THD, k_TGD, v_TGD, out_THD, lse_TH = ctx.saved_tensors
        _, attend_backward = choose_attention(q_THD.device)
        dq_THD, dk_TGD, dv_TGD = torch.empty_like(q_THD), torch.empty_like(k_TGD), torch.empty_like(v_TGD)
        for a, b in pairwise(ctx.bounds):
            if b == a:
                continue
            dq_THD[a:b], dk_TGD[a:b], dv_TGD[a:b] = attend_backward(
                dout_THD[a:b],
                q_THD[a:b],
                k_TGD[a:b],
                v_TGD[a:b],
                out_THD[a:b],
                lse_TH[a:b],
                offset=0,
                **ctx.rule,
            )
        return dq_THD, dk_TGD, dv_TGD, None, None
