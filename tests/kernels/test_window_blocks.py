"""Windows in blocks: gradients of two triangles a block equal the reference's, wherever documents begin and end."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from tests.support.relative import relative_error
from torch import Tensor

from farspan.kernels.attention import window_blocks
from farspan.kernels.attention.flash import Sight, Spans
from farspan.kernels.attention.reference import attend_reference, attend_reference_backward
from farspan.kernels.attention.window_blocks import WindowBlocks

SCALE = 0.3


def rule_of(sight: Sight, queries: int, keys: int) -> dict[str, float | int | None]:
    return {"scale": sight.scale, "offset": keys - queries, "window": sight.left + 1, "softcap": sight.softcap}


@dataclass
class Reference:
    """A `FlashKernel` of windows; it counts the rows it is asked for."""

    rows: int = 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, sight: Sight) -> tuple[Tensor, Tensor]:
        parts = [
            attend_reference(q[a:b], k[a:b], v[a:b], **rule_of(sight, b - a, b - a))
            for a, b in pairwise(spans.query_bounds)
        ]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts]).T

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse_HT: Tensor, spans: Spans, sight: Sight
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.rows += q.shape[0]
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        ends = zip(pairwise(spans.query_bounds), pairwise(spans.key_bounds), strict=True)
        for (a, b), (c, d) in ends:
            parts = dout[a:b], q[a:b], k[c:d], v[c:d], out[a:b], lse_HT[:, a:b].T
            found = attend_reference_backward(*parts, **rule_of(sight, b - a, d - c))
            for grad, part, rows in zip(grads, found, (slice(a, b), slice(c, d), slice(c, d)), strict=True):
                grad[rows] = part
        return grads[0], grads[1], grads[2]


def causal_blocks(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    each = [
        attend_reference_backward(*parts, row.T, scale=scale, offset=0)
        for *parts, row in zip(dout, q, k, v, out, lse, strict=True)
    ]
    dq, dk, dv = (torch.stack(grads) for grads in zip(*each, strict=True))
    return dq, dk, dv


@pytest.mark.parametrize(
    ("bounds", "window", "by_rest"),
    [
        ((0, 40), 20, 0),
        ((0, 60), 20, 0),
        ((0, 67), 20, 7),
        ((0, 41), 20, 1),
        ((0, 59), 20, 19),
        # Shorter than two windows; a window below the least.
        ((0, 39), 20, 39),
        ((0, 60), 19, 60),
        ((0, 3, 5, 70, 72, 120), 20, 3 + 2 + 5 + 2 + 8),
        ((0, 44, 132), 22, 0),
    ],
)
@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (4, 1)], ids=str)
def test_gradients_of_windows_in_blocks_equal_the_reference_in_fp64(
    bounds: tuple[int, ...], window: int, by_rest: int, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two blocks a call, so that there are several groups and a last one that is smaller.
    monkeypatch.setattr(window_blocks, "_TOKENS_AT_ONCE", 2 * window)
    generator = torch.Generator().manual_seed(len(bounds) + window)
    sizes = [(bounds[-1], count, 8) for count in (*heads, heads[1], heads[0])]
    q, k, v, dout = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    rest = Reference()
    kernel = WindowBlocks(causal_blocks, rest, least_tokens=20)
    bounds_N, longest = torch.tensor(bounds), max(b - a for a, b in pairwise(bounds))
    spans, sight = Spans(bounds_N, bounds_N, longest, longest, bounds, bounds), Sight(SCALE, window - 1, 0, None)
    out, lse = kernel.forward(q, k, v, spans, sight)
    found = kernel.backward(dout, q, k, v, out, lse, spans, sight)
    assert rest.rows == by_rest
    want = Reference().backward(dout, q, k, v, out, lse, spans, sight)
    for name, got, exact in zip(("dq", "dk", "dv"), found, want, strict=True):
        assert relative_error(got, exact) < 1e-12, name
