"""Partial attention, forward and backward, against torch's scaled_dot_product_attention on the same tensors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from farspan.kernels.attention.dispatch import choose_attention

# tokens, query heads, key heads, head dim
_CASES = ((2048, 6, 2, 64), (8192, 6, 2, 64))
_ROUNDS = 5


def bench_attention() -> list[dict[str, Any]]:
    """One row per case: median seconds of both, and farspan's as a ratio of torch's (below 1 is faster).

    Both run in turn in every round, so that a machine whose speed drifts drifts for both; each round's outputs are
    compared first, because a fast wrong answer is not a result.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [_case(device, dtype, *case) for dtype in (torch.float32, torch.bfloat16) for case in _CASES]


def _case(device: torch.device, dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, dim: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((tokens, heads, dim), (tokens, kv_heads, dim), (tokens, kv_heads, dim), (tokens, heads, dim))
    q, k, v, dout = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
    ours, theirs = _farspan(q, k, v, dout), _torch(q, k, v, dout)
    worst = max(_relative_error(a, b) for a, b in zip(ours(), theirs(), strict=True))
    assert worst < (5e-2 if dtype == torch.bfloat16 else 1e-4), f"farspan and torch disagree by {worst}"
    pairs = [(_seconds(ours), _seconds(theirs)) for _ in range(_ROUNDS)]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "heads": f"{heads}:{kv_heads}",
        "farspan_s": statistics.median(a for a, _ in pairs),
        "torch_s": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
        "worst_error": worst,
    }


def _farspan(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    forward, backward = choose_attention(q.device)
    scale = q.shape[-1] ** -0.5

    def run() -> tuple[Tensor, ...]:
        out, lse = forward(q, k, v, scale=scale, offset=0)
        return out, *backward(dout, q, k, v, out, lse, scale=scale, offset=0)

    return run


def _torch(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    def run() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in leaves)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        out = out[0].transpose(0, 1)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    return run


def _seconds(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())
