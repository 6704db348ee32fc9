"""The flash-attention that comes inside torch: no soft cap, head dims of q and v equal, fp16 and bf16.

Letters: contract.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farspan.kernels.attention.flash import FlashKernel, Sight, Spans, require_arguments

_FORWARD = torch.ops.aten._flash_attention_forward
_BACKWARD = torch.ops.aten._flash_attention_backward
_NAMES = ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "scale", "window_size_left",
          "window_size_right")  # fmt: skip


def load_kernel() -> FlashKernel:
    """Raises ImportError where this torch has other kernels."""
    require_arguments(_FORWARD, (*_NAMES, "return_debug_mask"), num_returns=5)
    require_arguments(_BACKWARD, (*_NAMES, "logsumexp", "rng_state", "unused"), num_returns=3)
    return _TorchFlash()


class _TorchFlash:
    def forward(self, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, spans: Spans, sight: Sight) -> tuple[Tensor, Tensor]:
        out_THD, lse_HT, *_ = _FORWARD(
            q_THD,
            k_SGD,
            v_SGD,
            spans.queries_N,
            spans.keys_N,
            spans.longest_query,
            spans.longest_key,
            0.0,
            sight.causal,
            False,
            scale=sight.scale,
            window_size_left=sight.left,
            window_size_right=sight.right,
        )
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
        # The state of a random generator that dropout 0 never reads.
        state, unused = (torch.zeros(size, dtype=torch.uint64, device=q_THD.device) for size in (2, 0))
        dq_THD, dk_SGD, dv_SGD = _BACKWARD(
            dout_THD,
            q_THD,
            k_SGD,
            v_SGD,
            out_THD,
            lse_HT,
            spans.queries_N,
            spans.keys_N,
            spans.longest_query,
            spans.longest_key,
            0.0,
            sight.causal,
            state,
            unused,
            scale=sight.scale,
            window_size_left=sight.left,
            window_size_right=sight.right,
        )
        return dq_THD, dk_SGD, dv_SGD
