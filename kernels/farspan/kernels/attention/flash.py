"""Partial attention by flash-attention libraries: the contract in the words of their kernels for packed documents.

Such a kernel takes offsets of documents and a window (left, right) counted from the bottom right corner: query t of a
document with T queries and S keys sees the keys s with t + S - T - left <= s <= t + S - T + right; -1 is no limit. A
pair is one document whose queries and keys differ in number. Rows that see nothing are cut away before the call: what
libraries write for them differs, and here it is zeros and lse -inf.

Contracts and letters: contract.py and packed.py; N documents. Every kernel's lse is lse_HT, fp32, natural log.
Source: FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from farspan.kernels.attention.backend import Backend
from farspan.kernels.attention.contract import check_pair
from farspan.kernels.attention.packed import check_bounds


@dataclass(frozen=True, slots=True)
class Spans:
    """Where documents lie: int32 offsets [N + 1] of their queries and keys on the device, and the longest of each."""

    queries_N: Tensor
    keys_N: Tensor
    longest_query: int
    longest_key: int
    query_bounds: tuple[int, ...]
    key_bounds: tuple[int, ...]
    """The same offsets where Python can read them without waiting for the device."""

    def part(self, first: int, stop: int) -> Spans:
        """The documents first..stop, counted from the first of their own tokens."""
        queries, keys = self.query_bounds[first : stop + 1], self.key_bounds[first : stop + 1]
        return Spans(
            self.queries_N[first : stop + 1] - queries[0],
            self.keys_N[first : stop + 1] - keys[0],
            max(b - a for a, b in pairwise(queries)),
            max(b - a for a, b in pairwise(keys)),
            tuple(offset - queries[0] for offset in queries),
            tuple(offset - keys[0] for offset in keys),
        )


@dataclass(frozen=True, slots=True)
class Sight:
    """What a query sees of its document."""

    scale: float
    left: int
    right: int
    softcap: float | None

    @property
    def causal(self) -> bool:
        return self.left < 0 and self.right == 0


class FlashKernel(Protocol):
    """The kernels of one library."""

    def forward(self, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, spans: Spans, sight: Sight) -> tuple[Tensor, Tensor]:
        """(out_THD, lse_HT)."""
        ...

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
        """(dq, dk, dv)."""
        ...


@dataclass(frozen=True, slots=True)
class Core:
    """The queries and keys of a pair of which each sees and is seen, and the window between them."""

    queries: slice
    keys: slice
    left: int
    right: int


def core_of(num_queries: int, num_keys: int, offset: int | None, window: int | None) -> Core | None:
    """What of a pair a flash kernel computes; none where nothing is seen."""
    if offset is None:
        return Core(slice(0, num_queries), slice(0, num_keys), -1, -1) if num_queries and num_keys else None
    reach = window if window is not None else num_queries + num_keys + abs(offset)
    first_query, last_query = max(0, -offset), min(num_queries, num_keys - 1 + reach - offset)
    first_key, last_key = max(0, first_query + offset - reach + 1), min(num_keys, last_query + offset)
    if first_query >= last_query or first_key >= last_key:
        return None
    num_queries, num_keys = last_query - first_query, last_key - first_key
    # The last query, at this position among the keys, sees the last key: neither distance is negative.
    at = num_queries - 1 + offset + first_query - first_key
    right = at - (num_keys - 1)
    left = num_keys - 1 - (at - reach + 1)
    return Core(
        slice(first_query, last_query),
        slice(first_key, last_key),
        left if left < num_keys - 1 else -1,
        right if right < num_queries - 1 else -1,
    )


def flash_backend(name: str, kernel: FlashKernel) -> Backend:
    """A library's kernels behind the contracts."""
    by = _ByFlash(kernel)
    return Backend(name, by.forward, by.backward, by.packed_forward, by.packed_backward)


@dataclass(frozen=True, slots=True)
class _ByFlash:
    kernel: FlashKernel

    def forward(
        self,
        q_THD: Tensor,
        k_SGD: Tensor,
        v_SGC: Tensor,
        *,
        scale: float,
        offset: int | None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        check_pair(q_THD, k_SGD, v_SGC, offset, window)
        core = core_of(q_THD.shape[0], k_SGD.shape[0], offset, window)
        if core is None:
            return _nothing(q_THD)
        q, k, v = _plain(q_THD[core.queries], k_SGD[core.keys], v_SGC[core.keys])
        sight = Sight(scale, core.left, core.right, softcap)
        part_THC, part_lse_HT = self.kernel.forward(q, k, v, spans_of_pair(q, k), sight)
        if q.shape[0] == q_THD.shape[0]:
            return part_THC, part_lse_HT.transpose(0, 1)
        out_THC, lse_TH = _nothing(q_THD)
        out_THC[core.queries], lse_TH[core.queries] = part_THC, part_lse_HT.transpose(0, 1)
        return out_THC, lse_TH

    def backward(
        self,
        dout_THC: Tensor,
        q_THD: Tensor,
        k_SGD: Tensor,
        v_SGC: Tensor,
        out_THC: Tensor,
        lse_TH: Tensor,
        *,
        scale: float,
        offset: int | None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_pair(q_THD, k_SGD, v_SGC, offset, window)
        core = core_of(q_THD.shape[0], k_SGD.shape[0], offset, window)
        if core is None:
            return torch.zeros_like(q_THD), torch.zeros_like(k_SGD), torch.zeros_like(v_SGC)
        dout, q, out = _plain(*(x[core.queries] for x in (dout_THC, q_THD, out_THC)))
        k, v = _plain(k_SGD[core.keys], v_SGC[core.keys])
        lse_HT = lse_TH[core.queries].transpose(0, 1).contiguous()
        sight = Sight(scale, core.left, core.right, softcap)
        found = self.kernel.backward(dout, q, k, v, out, lse_HT, spans_of_pair(q, k), sight)
        dq, dk, dv = (
            _placed(grad, like, rows)
            for grad, like, rows in zip(found, (q_THD, k_SGD, v_SGC), (core.queries, core.keys, core.keys), strict=True)
        )
        return dq, dk, dv

    def packed_forward(
        self,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGC: Tensor,
        *,
        bounds: Sequence[int],
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        check_pair(q_THD, k_TGD, v_TGC, 0, window)
        check_bounds(bounds, q_THD.shape[0])
        q, k, v = _plain(q_THD, k_TGD, v_TGC)
        spans, sight = _spans_of_documents(bounds, q.device), _sight_of_documents(bounds, scale, window, softcap)
        out_THC, lse_HT = self.kernel.forward(q, k, v, spans, sight)
        return out_THC, lse_HT.transpose(0, 1)

    def packed_backward(
        self,
        dout_THC: Tensor,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGC: Tensor,
        out_THC: Tensor,
        lse_TH: Tensor,
        *,
        bounds: Sequence[int],
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_pair(q_THD, k_TGD, v_TGC, 0, window)
        check_bounds(bounds, q_THD.shape[0])
        dout, q, k, v, out = _plain(dout_THC, q_THD, k_TGD, v_TGC, out_THC)
        spans, sight = _spans_of_documents(bounds, q.device), _sight_of_documents(bounds, scale, window, softcap)
        return self.kernel.backward(dout, q, k, v, out, lse_TH.transpose(0, 1).contiguous(), spans, sight)


def require_arguments(op: Any, names: Iterable[str], num_returns: int) -> None:
    """Refuse a library whose kernel takes other arguments than we give it.

    Raises:
        ImportError: the first argument it does not have, or another number of results.
    """
    schema = op.default._schema
    known = {argument.name for argument in schema.arguments}
    if unknown := [name for name in names if name not in known]:
        raise ImportError(f"{schema.name} has no argument {unknown[0]}")
    if len(schema.returns) != num_returns:
        raise ImportError(f"{schema.name} gives {len(schema.returns)} results, not {num_returns}")


def _sight_of_documents(bounds: Sequence[int], scale: float, window: int | None, softcap: float | None) -> Sight:
    longest = max(b - a for a, b in pairwise(bounds))
    return Sight(scale, window - 1 if window is not None and window < longest else -1, 0, softcap)


def _spans_of_documents(bounds: Sequence[int], device: torch.device) -> Spans:
    # Empty documents have no rows: without them offsets rise.
    offsets = sorted(set(bounds))
    bounds_N = torch.tensor(offsets, dtype=torch.int32).to(device, non_blocking=True)
    longest = max((b - a for a, b in pairwise(offsets)), default=0)
    return Spans(bounds_N, bounds_N, longest, longest, tuple(offsets), tuple(offsets))


def spans_of_pair(q_THD: Tensor, k_SGD: Tensor) -> Spans:
    num_queries, num_keys = q_THD.shape[0], k_SGD.shape[0]
    # Made on the device: a copy from the host would wait for it.
    queries_N, keys_N = (
        torch.arange(0, length + 1, length, dtype=torch.int32, device=q_THD.device)
        for length in (num_queries, num_keys)
    )
    return Spans(queries_N, keys_N, num_queries, num_keys, (0, num_queries), (0, num_keys))


def _plain(*tensors: Tensor) -> list[Tensor]:
    """The tensors with head dims contiguous in memory, as the kernels take them."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _nothing(q_THD: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of queries that see no key."""
    return torch.zeros_like(q_THD), q_THD.new_full(q_THD.shape[:2], float("-inf"), dtype=torch.float32)


def _placed(grad: Tensor, like: Tensor, rows: slice) -> Tensor:
    """The gradient of all rows: zeros where nothing was seen."""
    if grad.shape[0] == like.shape[0]:
        return grad
    whole = torch.zeros_like(like)
    whole[rows] = grad
    return whole
