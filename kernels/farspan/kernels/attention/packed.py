"""Causal attention inside each document of a packed sequence: the contract, and a loop that keeps it.

Shapes: T tokens of the whole sequence, the other letters as in contract.py. `bounds` are the N + 1 offsets of N
documents, from 0 to T, each at least the one before it; an empty document has no rows.

forward:  as the contract of a pair with offset 0, for every document by itself: (out_THC, lse_TH).
backward: takes the final out and lse of the whole sequence; returns (dq, dk, dv) of the whole sequence.

Documents never see each other because no pair across a bound is ever computed: there is no mask to lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from farspan.kernels.attention.contract import Backward, Forward


class PackedForward(Protocol):
    def __call__(
        self,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGC: Tensor,
        *,
        bounds: Sequence[int],
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]: ...


class PackedBackward(Protocol):
    def __call__(
        self,
        dout_THC: Tensor,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGC: Tensor,
        out_THC: Tensor,
        lse_TH: Tensor,
        *,
        bounds: Sequence[int],
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def check_bounds(bounds: Sequence[int], num_tokens: int) -> None:
    """Assert that documents cover the sequence in order: rows of no document would stay unwritten."""
    assert len(bounds) >= 2, "at least one document"
    assert bounds[0] == 0, "documents start at token 0"
    assert bounds[-1] == num_tokens, "documents cover the sequence"
    assert all(a <= b for a, b in pairwise(bounds)), "documents follow each other"


def forward_each(forward: Forward) -> PackedForward:
    """The packed forward of a backend that computes one pair at a time."""

    def attend(
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGC: Tensor,
        *,
        bounds: Sequence[int],
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        check_bounds(bounds, q_THD.shape[0])
        wide = torch.promote_types(q_THD.dtype, torch.float32)
        out_THC = q_THD.new_empty(*q_THD.shape[:2], v_TGC.shape[2])
        lse_TH = q_THD.new_empty(q_THD.shape[:2], dtype=wide)
        for a, b in pairwise(bounds):
            if a < b:
                out_THC[a:b], lse_TH[a:b] = forward(
                    q_THD[a:b], k_TGD[a:b], v_TGC[a:b], scale=scale, offset=0, window=window, softcap=softcap
                )
        return out_THC, lse_TH

    return attend


def backward_each(backward: Backward) -> PackedBackward:
    """The packed backward of a backend that computes one pair at a time."""

    def attend_backward(
        dout_THC: Tensor,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGC: Tensor,
        out_THC: Tensor,
        lse_TH: Tensor,
        *,
        bounds: Sequence[int],
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_bounds(bounds, q_THD.shape[0])
        dq_THD, dk_TGD, dv_TGC = (x.new_empty(x.shape) for x in (q_THD, k_TGD, v_TGC))
        tensors = (dout_THC, q_THD, k_TGD, v_TGC, out_THC, lse_TH)
        for a, b in pairwise(bounds):
            if a < b:
                dq_THD[a:b], dk_TGD[a:b], dv_TGC[a:b] = backward(
                    *(x[a:b] for x in tensors), scale=scale, offset=0, window=window, softcap=softcap
                )
        return dq_THD, dk_TGD, dv_TGC

    return attend_backward
