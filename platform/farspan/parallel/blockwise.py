"""Attention computed pair by pair: what every strategy shares.

Shapes: t query tokens a rank holds, s key tokens, H query heads, G key/value heads, D head dim of q and k, C of v.
Out, log-sum-exp and gradients are summed in fp32 (fp64 for fp64 inputs), whatever the inputs are.
Source: the block-wise forward and backward of Ring Attention (Liu et al. 2023, https://arxiv.org/abs/2310.01889).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from farspan.kernels.attention.dispatch import choose_backend
from farspan.kernels.attention.limits import Ask
from farspan.kernels.merge.reference import merge_partials_reference
from farspan.kernels.merge.sink import merge_sinks, sinks_gradient
from farspan.parallel.pairs import Pair


@dataclass(frozen=True, slots=True)
class Rule:
    """How one layer scores: `window` tokens back, `softcap` on scores, attention inside chunks of `chunk` tokens."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    chunk: int | None = None


class Strategy(Protocol):
    """Attention of the tokens this rank holds over everything they see: (q_tHD, k_tGD, v_tGC) -> out_tHC.

    `sinks_H`: a logit per query head that takes part in the softmax and has no value. Its gradient on a rank is the
    part of this rank's tokens or heads, as that of every weight: the sum over ranks is the whole.
    """

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
    ) -> Tensor: ...


class BlockwiseAttention(ABC):
    """A strategy told by its forward and its backward over blocks; autograd is the same for all of them."""

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
        rule = Rule(scale, window, softcap, chunk)
        return cast(Tensor, _Attend.apply(q_tHD, k_tGD, v_tGC, sinks_H, self, rule))

    @abstractmethod
    def forward(self, q_tHD: Tensor, k_tGD: Tensor, v_tGC: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        """(out_tHC, lse_tH), final: merged over every key a query sees."""

    @abstractmethod
    def backward(
        self, dout_tHC: Tensor, q_tHD: Tensor, k_tGD: Tensor, v_tGC: Tensor, out_tHC: Tensor, lse_tH: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of the tokens this rank holds, summed over every rank."""


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_tHD: Tensor,
        k_tGD: Tensor,
        v_tGC: Tensor,
        sinks_H: Tensor | None,
        attention: BlockwiseAttention,
        rule: Rule,
    ) -> Tensor:
        out_tHC, lse_tH = attention.forward(q_tHD, k_tGD, v_tGC, rule)
        if sinks_H is not None:
            out_tHC, lse_tH = merge_sinks(out_tHC, lse_tH, sinks_H)
        ctx.save_for_backward(q_tHD, k_tGD, v_tGC, out_tHC, lse_tH, sinks_H)
        ctx.attention, ctx.rule = attention, rule
        return out_tHC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_tHD, k_tGD, v_tGC, out_tHC, lse_tH, sinks_H = ctx.saved_tensors
        found = ctx.attention.backward(grads[0], q_tHD, k_tGD, v_tGC, out_tHC, lse_tH, ctx.rule)
        narrow = (g.to(x.dtype) for g, x in zip(found, (q_tHD, k_tGD, v_tGC), strict=True))
        dsinks_H = None if sinks_H is None else sinks_gradient(grads[0], out_tHC, lse_tH, sinks_H).to(sinks_H.dtype)
        return *narrow, dsinks_H, None, None


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type sums are kept in."""
    return torch.promote_types(dtype, torch.float32)


def attend_pair(q_tHD: Tensor, k_sGD: Tensor, v_sGC: Tensor, pair: Pair, rule: Rule) -> tuple[Tensor, Tensor]:
    """(out, lse) of the queries of one pair over its keys."""
    return choose_backend(Ask.of(q_tHD, v_sGC, rule.softcap)).forward(
        q_tHD[pair.queries],
        k_sGD[pair.keys],
        v_sGC[pair.keys],
        scale=rule.scale,
        offset=pair.offset,
        window=pair.window,
        softcap=rule.softcap,
    )


class Partial:
    """Out and log-sum-exp of t queries over the keys met so far."""

    def __init__(self, q_tHD: Tensor, value_dim: int) -> None:
        wide = wide_dtype(q_tHD.dtype)
        self.out_tHC = q_tHD.new_zeros((*q_tHD.shape[:2], value_dim), dtype=wide)
        self.lse_tH = q_tHD.new_full(q_tHD.shape[:2], float("-inf"), dtype=wide)
        self._met = bytearray(q_tHD.shape[0])

    def add(self, q_tHD: Tensor, k_sGD: Tensor, v_sGC: Tensor, met: Sequence[Pair], rule: Rule) -> None:
        """Attend over the pairs `met` and merge."""
        for pair in met:
            self.merge(pair.queries, *attend_pair(q_tHD, k_sGD, v_sGC, pair, rule))

    def merge(self, queries: slice, part_tHC: Tensor, part_lse_tH: Tensor) -> None:
        """Merge what `queries` found among other keys."""
        if self._met.find(1, queries.start, queries.stop) < 0:
            # Nothing to merge with: a copy is exact and costs no exponentials.
            self.out_tHC[queries], self.lse_tH[queries] = part_tHC, part_lse_tH
        else:
            self.out_tHC[queries], self.lse_tH[queries] = merge_partials_reference(
                self.out_tHC[queries], self.lse_tH[queries], part_tHC, part_lse_tH
            )
        self._met[queries] = b"\x01" * (queries.stop - queries.start)


class Gradients(NamedTuple):
    """Sums of the gradients of q, k and v."""

    dq_tHD: Tensor
    dk_sGD: Tensor
    dv_sGC: Tensor


def add_gradients(
    into: Gradients,
    dout_tHC: Tensor,
    q_tHD: Tensor,
    k_sGD: Tensor,
    v_sGC: Tensor,
    out_tHC: Tensor,
    lse_tH: Tensor,
    met: Sequence[Pair],
    rule: Rule,
) -> None:
    """Add the gradients of the pairs `met`; out and lse are final."""
    for pair in met:
        found = gradients_of(dout_tHC, q_tHD, k_sGD, v_sGC, out_tHC, lse_tH, pair, rule)
        into.dq_tHD[pair.queries] += found.dq_tHD
        into.dk_sGD[pair.keys] += found.dk_sGD
        into.dv_sGC[pair.keys] += found.dv_sGC


def gradients_of(
    dout_tHC: Tensor,
    q_tHD: Tensor,
    k_sGD: Tensor,
    v_sGC: Tensor,
    out_tHC: Tensor,
    lse_tH: Tensor,
    pair: Pair,
    rule: Rule,
) -> Gradients:
    """Gradients of the queries and keys of one pair."""
    found = choose_backend(Ask.of(q_tHD, v_sGC, rule.softcap)).backward(
        dout_tHC[pair.queries],
        q_tHD[pair.queries],
        k_sGD[pair.keys],
        v_sGC[pair.keys],
        out_tHC[pair.queries],
        lse_tH[pair.queries],
        scale=rule.scale,
        offset=pair.offset,
        window=pair.window,
        softcap=rule.softcap,
    )
    return Gradients(*found)


def zeros_wide(like: Tensor) -> Tensor:
    """A sum to start from."""
    return torch.zeros_like(like, dtype=wide_dtype(like.dtype))
