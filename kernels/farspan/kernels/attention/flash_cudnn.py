"""cuDNN's attention inside torch for long documents, torch's flash kernel for all others.

On Hopper cuDNN computes a long document in about half the time, but one document a call and without windows. So a
packed sequence is cut into runs: each long document by itself, and what lies between two of them in one call of the
flash kernel. Windows over long documents are Triton's forward (flash_windows.py) and, in blocks, cuDNN's backward
(window_blocks.py). Letters: contract.py; N documents of one length.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from farspan.kernels.attention import flash_torch
from farspan.kernels.attention.flash import FlashKernel, Sight, Spans, require_arguments
from farspan.kernels.attention.flash_runs import Run, backward_by_runs, forward_by_runs, lengths_of, split
from farspan.kernels.attention.window_blocks import WindowBlocks

_FORWARD = torch.ops.aten._scaled_dot_product_cudnn_attention
_BACKWARD = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
# A shorter document does not fill the GPU: many of them in one call do.
_LEAST_TOKENS = 2048


def load_kernel(least_tokens: int = _LEAST_TOKENS) -> FlashKernel:
    """Raises ImportError where this torch has other kernels, or no cuDNN."""
    if not torch.backends.cudnn.is_available():
        raise ImportError("this torch has no cuDNN")
    require_arguments(_FORWARD, ("attn_bias", "compute_log_sumexp", "is_causal", "scale"), num_returns=9)
    require_arguments(_BACKWARD, ("logsumexp", "philox_seed", "cum_seq_q", "max_q", "is_causal"), num_returns=3)
    windows = WindowBlocks(backward_of_batch, _with_windows(flash_torch.load_kernel(), least_tokens), least_tokens)
    return LongDocuments(CudnnDocument(), windows, least_tokens)


class CudnnDocument:
    """A `FlashKernel` for one document whose queries see all keys, or causally as many keys as there are queries."""

    def forward(self, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, spans: Spans, sight: Sight) -> tuple[Tensor, Tensor]:
        out_1HTD, lse_1HT1, *_ = _FORWARD(
            *map(_with_heads_first, (q_THD, k_SGD, v_SGD)), None, True, 0.0, sight.causal, False, scale=sight.scale
        )
        return _with_tokens_first(out_1HTD), lse_1HT1[0, :, :, 0]

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
        dout, q, k, v, out, lse = (x.unsqueeze(0) for x in (dout_THD, q_THD, k_SGD, v_SGD, out_THD, lse_HT))
        dq, dk, dv = backward_of_batch(dout, q, k, v, out, lse, sight.scale, sight.causal)
        return dq[0], dk[0], dv[0]


def backward_of_batch(
    dout_NTHD: Tensor,
    q_NTHD: Tensor,
    k_NSGD: Tensor,
    v_NSGD: Tensor,
    out_NTHD: Tensor,
    lse_NHT: Tensor,
    scale: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of N documents of one length."""
    # The state of a random generator that dropout 0 never reads.
    state = torch.zeros((), dtype=torch.int64, device=q_NTHD.device)
    dq, dk, dv = _BACKWARD(
        *(x.transpose(1, 2) for x in (dout_NTHD, q_NTHD, k_NSGD, v_NSGD, out_NTHD)),
        lse_NHT.unsqueeze(3).contiguous(),
        state,
        state,
        None,
        None,
        None,
        q_NTHD.shape[1],
        k_NSGD.shape[1],
        0.0,
        causal,
        scale=scale,
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


@dataclass(frozen=True, slots=True)
class LongDocuments:
    """A `FlashKernel` made of two: `long` for each document of `least_tokens` queries and more, `rest` between them."""

    long: FlashKernel
    rest: FlashKernel
    least_tokens: int

    def forward(self, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, spans: Spans, sight: Sight) -> tuple[Tensor, Tensor]:
        return forward_by_runs(self._runs(spans, sight), q_THD, k_SGD, v_SGD, spans, sight)

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
        runs = self._runs(spans, sight)
        return backward_by_runs(runs, dout_THD, q_THD, k_SGD, v_SGD, out_THD, lse_HT, spans, sight)

    def _runs(self, spans: Spans, sight: Sight) -> list[Run]:
        are_long = [self._is_long(queries, keys, sight) for queries, keys in lengths_of(spans)]
        return split(spans, are_long, self.long, self.rest)

    def _is_long(self, queries: int, keys: int, sight: Sight) -> bool:
        if sight.softcap is not None or sight.left >= 0 or sight.right > 0:
            return False
        return queries >= self.least_tokens and (not sight.causal or queries == keys)


def _with_windows(flash: FlashKernel, least_tokens: int) -> FlashKernel:
    """The kernel given, alone where this torch came without Triton."""
    if find_spec("triton") is None:
        return flash
    from farspan.kernels.attention.flash_windows import TritonWindows

    return TritonWindows(flash, least_tokens)


def _with_heads_first(x_THD: Tensor) -> Tensor:
    """A view [1, heads, tokens, head dim]."""
    return x_THD.transpose(0, 1).unsqueeze(0)


def _with_tokens_first(x_1HTD: Tensor) -> Tensor:
    return x_1HTD[0].transpose(0, 1)
