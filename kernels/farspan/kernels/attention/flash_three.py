"""The flash-attn package, version 3, for Hopper GPUs: fp16 and bf16, head dims of q and v equal; soft caps too.

Letters: contract.py. Why its inner operators: flash_two.py.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from farspan.kernels.attention.flash import FlashKernel, Sight, Spans, require_arguments

_NAMES = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "window_size_left",
          "window_size_right", "softcap")  # fmt: skip


def load_kernel() -> FlashKernel:
    """Raises ImportError where flash-attn 3 is not installed, or has another interface."""
    importlib.import_module("flash_attn_interface")
    forward, backward = torch.ops.flash_attn_3._flash_attn_forward, torch.ops.flash_attn_3._flash_attn_backward
    require_arguments(forward, (*_NAMES, "causal"), num_returns=4)
    require_arguments(backward, (*_NAMES, "softmax_lse", "dq", "dk", "dv", "is_causal", "deterministic"), num_returns=1)
    return _FlashThree()


class _FlashThree:
    def forward(self, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, spans: Spans, sight: Sight) -> tuple[Tensor, Tensor]:
        op = torch.ops.flash_attn_3._flash_attn_forward
        out_THD, lse_HT, *_ = op(q_THD, k_SGD, v_SGD, **_rule(spans, sight), causal=sight.causal)
        return out_THD, lse_HT

    def backward(
        self,
        dout_THD: Tensor,
        q_THD: Tensor,
        k_SGD: Tensor,
        v_SGD: Tensor,
        out_THD: Tensor,
        lse_HT: Tensor,
        spans: Spans,
        sight: Sight,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (x.new_empty(x.shape) for x in (q_THD, k_SGD, v_SGD))
        torch.ops.flash_attn_3._flash_attn_backward(
            dout_THD,
            q_THD,
            k_SGD,
            v_SGD,
            out_THD,
            lse_HT,
            **_rule(spans, sight),
            dq=dq,
            dk=dk,
            dv=dv,
            is_causal=sight.causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv


def _rule(spans: Spans, sight: Sight) -> dict[str, Any]:
    return {
        "cu_seqlens_q": spans.queries_N,
        "cu_seqlens_k": spans.keys_N,
        "max_seqlen_q": spans.longest_query,
        "max_seqlen_k": spans.longest_key,
        "softmax_scale": sight.scale,
        "window_size_left": sight.left,
        "window_size_right": sight.right,
        "softcap": sight.softcap or 0.0,
    }
