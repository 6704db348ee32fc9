"""Parts of a model as far as memory goes: what they keep and the shapes they give, and nothing computed.

Shapes: T tokens (t in the call shape of strategies), H query heads, G key/value heads, D head dim of q and k, C of v,
E model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from farspan.plan.profile import AttentionShape


class _Keep(torch.autograd.Function):
    """Attention as far as memory goes.

    In backward flash kernels (torch's, flash-attn 2, cuDNN) sum dq in fp32, padded by document, and make dk and dv for
    every query head before they add up those that share a key head: 4.0 times the bytes of q with bf16 and shared
    heads for one document, up to 4.5 times for packed ones, as `farspan bench attention` shows.
    """

    @staticmethod
    def forward(ctx: Any, q_THD: Tensor, k_TGD: Tensor, v_TGC: Tensor) -> Tensor:
        out_THC = q_THD.new_empty(*q_THD.shape[:2], v_TGC.shape[2])
        lse_TH = q_THD.new_empty(q_THD.shape[:2], dtype=torch.promote_types(q_THD.dtype, torch.float32))
        ctx.save_for_backward(q_THD, k_TGD, v_TGC, out_THC, lse_TH)
        return out_THC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q_THD, k_TGD, v_TGC, _, _ = ctx.saved_tensors
        wide = torch.promote_types(q_THD.dtype, torch.float32)
        work = [q_THD.new_empty(q_THD.shape, dtype=wide), q_THD.new_empty(q_THD.numel() // 2)]
        if q_THD.shape[1] != k_TGD.shape[1]:
            work += [x.new_empty(*q_THD.shape[:2], x.shape[2]) for x in (k_TGD, v_TGC)]
        found = tuple(x.new_empty(x.shape) for x in (q_THD, k_TGD, v_TGC))
        del work
        return found


class WatchedAttention:
    """The call shape of every strategy; remembers what each layer asked for."""

    def __init__(self) -> None:
        self.layer = 0
        self.shapes: dict[int, AttentionShape] = {}

    def __call__(
        self,
        q_tHD: Tensor,
        k_tGD: Tensor,
        v_tGC: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        chunk: int | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        self.shapes.setdefault(
            self.layer,
            AttentionShape(q_tHD.shape[1], k_tGD.shape[1], q_tHD.shape[2], v_tGC.shape[2], window, chunk),
        )
        return cast(Tensor, _Keep.apply(q_tHD, k_tGD, v_tGC))


@dataclass(frozen=True, slots=True)
class OneDocument:
    """The whole sequence is one document on this rank."""

    num_tokens: int
    rank: int = 0
    num_ranks: int = 1

    @property
    def bounds(self) -> tuple[int, int]:
        return 0, self.num_tokens

    def documents(self, x_tE: Tensor) -> list[Tensor]:
        return [x_tE]

    def held(self, x_TE: Tensor) -> Tensor:
        return x_TE

    def to_channels(self, x_tRX: Tensor) -> Tensor:
        return x_tRX

    def to_tokens(self, x_T1X: Tensor) -> Tensor:
        return x_T1X


class _Tile(torch.autograd.Function):
    """What runs by tiles, as far as memory outside its tiles goes: the input is kept, the output has its shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.empty_like(x)


class Tiled(nn.Module):
    """In the place of a part that treats every token alone."""

    def forward(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return cast(Tensor, _Tile.apply(x))


class MixerStub(nn.Module):
    """A recurrent mixer without anything inside: what is left of its layer is computed on a rank's own tokens."""

    def forward(self, hidden_states: Tensor, **_kwargs: Any) -> Tensor:
        return cast(Tensor, _Nothing.apply(hidden_states))


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.empty_like(grads[0])


@contextmanager
def replaced(parts: Iterable[tuple[nn.Module, str, nn.Module]]) -> Iterator[None]:
    """Inside, each (owner, name) holds the module given for it."""
    parts = list(parts)
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in parts]
    for owner, name, stub in parts:
        setattr(owner, name, stub)
    try:
        yield
    finally:
        for owner, name, module in before:
            setattr(owner, name, module)
