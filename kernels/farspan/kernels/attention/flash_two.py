"""The flash-attn package, version 2: fp16 and bf16, head dims of q and v equal; soft caps too.

Letters: contract.py. Its operators with a backward of their own are called, because theirs takes the softmax of one
call and ours the log-sum-exp over every pair.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farspan.kernels.attention.flash import FlashKernel, Sight, Spans, require_arguments

_NAMES = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "dropout_p", "softmax_scale", "causal",
          "window_size_left", "window_size_right", "softcap", "alibi_slopes")  # fmt: skip


def load_kernel() -> FlashKernel:
    """Raises ImportError where flash-attn is not installed, or is another version."""
    library = importlib.import_module("flash_attn.flash_attn_interface")
    forward, backward = library._wrapped_flash_attn_varlen_forward, library._wrapped_flash_attn_varlen_backward
    require_arguments(forward, _NAMES, num_returns=4)
    require_arguments(backward, (*_NAMES, "softmax_lse", "dq", "dk", "dv", "deterministic"), num_returns=1)
    return _FlashTwo(forward, backward)


@dataclass(frozen=True, slots=True)
class _FlashTwo:
    forward_op: Any
    backward_op: Any

    def forward(self, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, spans: Spans, sight: Sight) -> tuple[Tensor, Tensor]:
        out_THD, lse_HT, *_ = self.forward_op(q_THD, k_SGD, v_SGD, **_rule(spans, sight))
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
        repeatable = torch.are_deterministic_algorithms_enabled()
        inputs = (dout_THD, q_THD, k_SGD, v_SGD, out_THD, lse_HT)
        self.backward_op(*inputs, dq, dk, dv, **_rule(spans, sight), deterministic=repeatable)
        return dq, dk, dv


def _rule(spans: Spans, sight: Sight) -> dict[str, Any]:
    return {
        "cu_seqlens_q": spans.queries_N,
        "cu_seqlens_k": spans.keys_N,
        "max_seqlen_q": spans.longest_query,
        "max_seqlen_k": spans.longest_key,
        "dropout_p": 0.0,
        "softmax_scale": sight.scale,
        "causal": sight.causal,
        "window_size_left": sight.left,
        "window_size_right": sight.right,
        "softcap": sight.softcap or 0.0,
        "alibi_slopes": None,
    }
