"""What a bench sets our attention beside: torch's SDPA, FlexAttention and flash-attn, on the same tensors.

A contestant is a forward (outputs that its backward may use) and a backward (out, dq, dk, dv given those). Letters:
contract.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from farspan.kernels.attention.backend import Backend


@dataclass(frozen=True, slots=True)
class Work:
    """One problem: causal attention inside each document, perhaps in a window, and a gradient of its output."""

    q_THD: Tensor
    k_TGD: Tensor
    v_TGD: Tensor
    dout_THD: Tensor
    bounds: tuple[int, ...]
    window: int | None

    @property
    def scale(self) -> float:
        return float(self.q_THD.shape[-1] ** -0.5)


@dataclass(frozen=True, slots=True)
class Contestant:
    name: str
    forward: Callable[[], Any]
    backward: Callable[[Any], tuple[Tensor, ...]]
    """(out, dq, dk, dv) from what forward returned, once for each forward."""


def ours(backend: Backend, work: Work) -> Contestant:
    rule: dict[str, Any] = {"scale": work.scale, "window": work.window}
    inputs = (work.q_THD, work.k_TGD, work.v_TGD)
    if len(work.bounds) > 2:
        rule["bounds"] = work.bounds
        forward, backward = backend.packed_forward, backend.packed_backward
    else:
        rule["offset"] = 0
        forward, backward = backend.forward, backend.backward  # type: ignore[assignment]
    return Contestant(
        f"farspan {backend.name}",
        lambda: forward(*inputs, **rule),
        lambda made: (made[0], *backward(work.dout_THD, *inputs, *made, **rule)),
    )


def sdpa(work: Work) -> Contestant:
    """torch's scaled_dot_product_attention: a call per document, and for a window its mask written out."""
    mask_TT = None
    if work.window is not None:
        behind_TT = (at := torch.arange(work.q_THD.shape[0], device=work.q_THD.device))[:, None] - at
        mask_TT = (behind_TT >= 0) & (behind_TT < work.window)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for a, b in pairwise(work.bounds):
            query, key, value = (x[a:b].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            out = scaled_dot_product_attention(
                query, key, value, attn_mask=mask_TT, is_causal=mask_TT is None, scale=work.scale, enable_gqa=True
            )
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    return _by_autograd("torch sdpa", attend, work)


def flex(work: Work) -> Contestant:
    """torch's FlexAttention, compiled, with a block mask of documents and window."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device, tokens = work.q_THD.device, work.q_THD.shape[0]
    lengths = torch.tensor(work.bounds).diff()
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)
    reach = work.window or tokens

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        behind = query - key
        return (behind >= 0) & (behind < reach) & (document_T[query] == document_T[key])

    # Compiled: written out first, the mask alone would take 16 GiB at 131072 tokens.
    block_mask = create_block_mask(sees, None, None, tokens, tokens, device=str(device), _compile=True)
    compiled = torch.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out: Tensor = compiled(query, key, value, block_mask=block_mask, scale=work.scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    return _by_autograd("torch flex", attend, work)


def flash_attn(work: Work) -> Contestant:
    """The flash-attn package, all documents in one call."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    bounds = torch.tensor(work.bounds, dtype=torch.int32, device=work.q_THD.device)
    longest = max(b - a for a, b in pairwise(work.bounds))
    reach = (-1 if work.window is None else work.window - 1, 0)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = flash_attn_varlen_func(
            q, k, v, bounds, bounds, longest, longest, softmax_scale=work.scale, causal=True, window_size=reach
        )
        return out

    return _by_autograd("flash-attn", attend, work)


def peers_on(device: torch.device, dtype: torch.dtype) -> list[Callable[[Work], Contestant]]:
    """The peers that have a forward and a backward here; FlexAttention has no backward on CPU."""
    if device.type != "cuda":
        return [sdpa]
    half = dtype in (torch.float16, torch.bfloat16)
    installed = importlib.util.find_spec("flash_attn") is not None
    return [sdpa, flex, *([flash_attn] if half and installed else [])]


def _by_autograd(name: str, attend: Callable[[Tensor, Tensor, Tensor], Tensor], work: Work) -> Contestant:
    leaves = [x.detach().requires_grad_() for x in (work.q_THD, work.k_TGD, work.v_TGD)]

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return out.detach(), *torch.autograd.grad(out, leaves, work.dout_THD)

    return Contestant(name, lambda: attend(*leaves), backward)
