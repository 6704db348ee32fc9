"""Windows over long documents: forward by our Triton kernel, backward by the flash kernel that is given.

On Hopper the forward of torch's flash kernel, made for Ampere, takes a quarter longer than ours for such windows, and
its backward little more than half as long (decision 0055). Both give one log-sum-exp. Letters: contract.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from farspan.kernels.attention.flash import FlashKernel, Sight, Spans
from farspan.kernels.attention.triton import attend_packed_triton, attend_triton

# Where it was measured.
_HEAD_DIM = 128


@dataclass(frozen=True, slots=True)
class TritonWindows:
    """A `FlashKernel`: windows over documents of `least_tokens` queries and keys and more are ours."""

    rest: FlashKernel
    least_tokens: int

    def forward(self, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, spans: Spans, sight: Sight) -> tuple[Tensor, Tensor]:
        is_long = min(spans.longest_query, spans.longest_key) >= self.least_tokens
        if sight.left < 0 or not is_long or q_THD.shape[2] != _HEAD_DIM:
            return self.rest.forward(q_THD, k_SGD, v_SGD, spans, sight)
        out_THD, lse_TH = _windowed(q_THD, k_SGD, v_SGD, spans, sight)
        return out_THD, lse_TH.transpose(0, 1)

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
        return self.rest.backward(dout_THD, q_THD, k_SGD, v_SGD, out_THD, lse_HT, spans, sight)


def _windowed(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, spans: Spans, sight: Sight) -> tuple[Tensor, Tensor]:
    """(out_THD, lse_TH)."""
    # One document is a pair: that needs no table of tiles.
    if len(spans.query_bounds) > 2:
        assert spans.query_bounds == spans.key_bounds, "packed documents have their keys"
        assert sight.right == 0, "packed documents are causal"
        return attend_packed_triton(
            q_THD,
            k_SGD,
            v_SGD,
            bounds=spans.query_bounds,
            scale=sight.scale,
            window=sight.left + 1,
            softcap=sight.softcap,
        )
    # A window whose end no query of this pair reaches is none: as far right as there are keys.
    right = sight.right if sight.right >= 0 else q_THD.shape[0]
    return attend_triton(
        q_THD,
        k_SGD,
        v_SGD,
        scale=sight.scale,
        offset=k_SGD.shape[0] - q_THD.shape[0] + right,
        window=sight.left + right + 1,
        softcap=sight.softcap,
    )
