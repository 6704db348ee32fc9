"""cuDNN's attention inside torch for long documents, torch's flash kernel for all others.

On Hopper cuDNN computes a long document in about half the time, but one document a call and without windows. So a
packed sequence is cut into runs: each long document by itself, and what lies between two of them in one call of the
flash kernel. The forward of windows over long documents is Triton's (flash_windows.py). Letters: contract.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise

import torch
from torch import Tensor

from farspan.kernels.attention import flash_torch
from farspan.kernels.attention.flash import FlashKernel, Sight, Spans, require_arguments

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
    return LongDocuments(CudnnDocument(), _with_windows(flash_torch.load_kernel(), least_tokens), least_tokens)


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
        # The state of a random generator that dropout 0 never reads.
        state = torch.zeros((), dtype=torch.int64, device=q_THD.device)
        dq, dk, dv = _BACKWARD(
            *map(_with_heads_first, (dout_THD, q_THD, k_SGD, v_SGD, out_THD)),
            lse_HT[None, :, :, None].contiguous(),
            state,
            state,
            None,
            None,
            None,
            q_THD.shape[0],
            k_SGD.shape[0],
            0.0,
            sight.causal,
            scale=sight.scale,
        )
        return _with_tokens_first(dq), _with_tokens_first(dk), _with_tokens_first(dv)


@dataclass(frozen=True, slots=True)
class LongDocuments:
    """A `FlashKernel` made of two: `long` for each document of `least_tokens` queries and more, `rest` between them."""

    long: FlashKernel
    rest: FlashKernel
    least_tokens: int

    def forward(self, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, spans: Spans, sight: Sight) -> tuple[Tensor, Tensor]:
        runs = list(self._runs(spans, sight))
        if len(runs) == 1:
            return runs[0].kernel.forward(q_THD, k_SGD, v_SGD, spans, sight)
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        lse_HT = q_THD.new_empty((q_THD.shape[1], q_THD.shape[0]), dtype=torch.float32)
        for run in runs:
            here, there = run.queries, run.keys
            part_THD, part_HT = run.kernel.forward(
                q_THD[here], k_SGD[there], v_SGD[there], spans.part(run.first, run.stop), sight
            )
            out_THD[here], lse_HT[:, here] = part_THD, part_HT
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
        runs = list(self._runs(spans, sight))
        if len(runs) == 1:
            return runs[0].kernel.backward(dout_THD, q_THD, k_SGD, v_SGD, out_THD, lse_HT, spans, sight)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THD, k_SGD, v_SGD))
        for run in runs:
            here, there = run.queries, run.keys
            dq[here], dk[there], dv[there] = run.kernel.backward(
                *(dout_THD[here], q_THD[here], k_SGD[there], v_SGD[there], out_THD[here]),
                lse_HT[:, here].contiguous(),
                spans.part(run.first, run.stop),
                sight,
            )
        return dq, dk, dv

    def _runs(self, spans: Spans, sight: Sight) -> Iterator[Run]:
        for first, stop, is_long in runs_of(spans.query_bounds, spans.key_bounds, sight, self.least_tokens):
            yield Run(
                kernel=self.long if is_long else self.rest,
                first=first,
                stop=stop,
                queries=slice(spans.query_bounds[first], spans.query_bounds[stop]),
                keys=slice(spans.key_bounds[first], spans.key_bounds[stop]),
            )


@dataclass(frozen=True, slots=True)
class Run:
    """Documents first..stop, which one call of one kernel computes."""

    kernel: FlashKernel
    first: int
    stop: int
    queries: slice
    keys: slice


def runs_of(
    query_bounds: Sequence[int], key_bounds: Sequence[int], sight: Sight, least_tokens: int
) -> list[tuple[int, int, bool]]:
    """(first document, end, whether it is one long document), in order and without gaps."""
    whole = sight.softcap is None and sight.left < 0 and sight.right <= 0
    runs: list[tuple[int, int, bool]] = []
    for document, ((a, b), (c, d)) in enumerate(zip(pairwise(query_bounds), pairwise(key_bounds), strict=True)):
        is_long = whole and b - a >= least_tokens and (not sight.causal or b - a == d - c)
        if runs and not is_long and not runs[-1][2]:
            runs[-1] = (runs[-1][0], document + 1, False)
        else:
            runs.append((document, document + 1, is_long))
    return runs


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
