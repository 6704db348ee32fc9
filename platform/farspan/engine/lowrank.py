"""What adapters add to linear layers while one forward computes many sequences, each with its own adapter or none.

A layer itself is computed once for all tokens; a hook of torch behind it adds `scale * B A x` to the rows of each
adapter, and touches no other row. Which rows those are is known of a packed batch, and of the part of it that a
recurrent layer is called with; a layer that gets anything else than one row for each token is found out.
Source: the batching of many adapters in S-LoRA (Sheng et al. 2023, https://arxiv.org/abs/2311.03285).

Shapes: T packed tokens, N rows of one adapter, I width into a layer, O out of it, R rank.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from farspan.errors import ModelError

BASE = ""
"""The adapter of a request that names none."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The two matrices beside one layer."""

    down_RI: Tensor
    up_OR: Tensor
    scale: float

    @property
    def num_bytes(self) -> int:
        return self.down_RI.nbytes + self.up_OR.nbytes

    def to(self, device: torch.device) -> Pair:
        return Pair(self.down_RI.to(device, non_blocking=True), self.up_OR.to(device, non_blocking=True), self.scale)


Pairs: TypeAlias = Mapping[str, Pair]
"""Of one adapter, by the name of the layer."""

# Rows of one adapter; none: all rows there are.
_Rows: TypeAlias = slice | Tensor | None


@dataclass(slots=True)
class _Spans:
    """Whose the tokens of one forward are: (start, stop, adapter), neighbours of one adapter together."""

    spans: list[tuple[int, int, str]] = field(default_factory=list)
    found: dict[tuple[int, int], list[tuple[str, _Rows]]] = field(default_factory=dict)

    @classmethod
    def of(cls, counts: Sequence[tuple[str, int]]) -> _Spans:
        made, start = cls(), 0
        for adapter, count in counts:
            if made.spans and made.spans[-1][2] == adapter:
                made.spans[-1] = (made.spans[-1][0], start + count, adapter)
            else:
                made.spans.append((start, start + count, adapter))
            start += count
        return made

    @property
    def num_tokens(self) -> int:
        return self.spans[-1][1]

    def rows(self, low: int, high: int, device: torch.device) -> list[tuple[str, _Rows]]:
        """The rows of each adapter among tokens low..high, counted from `low`."""
        if (low, high) not in self.found:
            self.found[low, high] = [
                (adapter, _joined(parts, device)) for adapter, parts in self._parts(low, high).items()
            ]
        return self.found[low, high]

    def _parts(self, low: int, high: int) -> dict[str, list[range] | None]:
        parts: dict[str, list[range] | None] = {}
        for start, stop, adapter in self.spans:
            here = range(max(start, low) - low, min(stop, high) - low)
            if adapter != BASE and here:
                if len(here) == high - low:
                    return {adapter: None}
                known = parts.setdefault(adapter, [])
                assert known is not None, "one span had all rows"
                known.append(here)
        return parts


def _joined(parts: list[range] | None, device: torch.device) -> _Rows:
    if parts is None:
        return None
    if len(parts) == 1:
        return slice(parts[0].start, parts[0].stop)
    return torch.cat([torch.arange(part.start, part.stop) for part in parts]).to(device)


class LowRank:
    """The adapters that one model's layers may use, and whose the tokens of the running forward are."""

    def __init__(self) -> None:
        self.pairs: dict[str, Pairs] = {}
        """Adapters by name, on the device."""
        self._hooks: dict[str, tuple[RemovableHandle, int]] = {}
        self._spans: _Spans | None = None
        self._window: tuple[int, int] | None = None
        # The model lives longer than its engine: what stands at its layers goes with this.
        weakref.finalize(self, _remove_all, self._hooks)

    def attach(self, layers: Mapping[str, nn.Module]) -> None:
        """Let adapters add to these layers, until they are detached as often."""
        for name, layer in layers.items():
            handle, users = self._hooks.get(name) or (layer.register_forward_hook(_hook(self, name)), 0)
            self._hooks[name] = handle, users + 1

    def detach(self, names: Sequence[str]) -> None:
        for name in names:
            handle, users = self._hooks.pop(name)
            if users > 1:
                self._hooks[name] = handle, users - 1
            else:
                handle.remove()

    @contextmanager
    def over(self, counts: Sequence[tuple[str, int]]) -> Iterator[None]:
        """In here the packed tokens belong to these adapters, so many one after the other."""
        self._spans = _Spans.of(counts) if any(adapter != BASE for adapter, _ in counts) else None
        try:
            yield
        finally:
            self._spans = None

    @contextmanager
    def window(self, low: int, high: int) -> Iterator[None]:
        """In here layers get the packed tokens low..high alone."""
        self._window = low, high
        try:
            yield
        finally:
            self._window = None

    def add(self, name: str, args: tuple[Any, ...], output: Any) -> Tensor | None:
        """`output` of the layer `name` with what each adapter adds; none: as it is."""
        if self._spans is None:
            return None
        if not args or not isinstance(output, Tensor):
            raise ModelError(f"{name} is called in a way that leaves an adapter no place")
        low, high = self._window or (0, self._spans.num_tokens)
        x_TI, out_TO = args[0].reshape(-1, args[0].shape[-1]), output.reshape(-1, output.shape[-1])
        for adapter, rows in self._spans.rows(low, high, x_TI.device):
            pair = self.pairs[adapter].get(name)
            if pair is None:
                continue
            if rows is not None and len(x_TI) != high - low:
                raise ModelError(f"{name} computes {len(x_TI)} rows for {high - low} tokens: whose they are is unknown")
            add_rows(out_TO, x_TI, pair, rows)
        return out_TO.view(output.shape)


def _hook(lowrank: LowRank, name: str) -> Callable[..., Tensor | None]:
    """A hook that does not keep the adapters alive."""
    there = weakref.ref(lowrank)

    def add(_: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        found = there()
        return None if found is None else found.add(name, args, output)

    return add


def _remove_all(hooks: Mapping[str, tuple[RemovableHandle, int]]) -> None:
    for handle, _ in hooks.values():
        handle.remove()


def add_rows(out_TO: Tensor, x_TI: Tensor, pair: Pair, rows: slice | Tensor | None) -> None:
    """Add what an adapter makes of its rows of `x_TI` to the same rows of `out_TO`."""
    x_NI = x_TI if rows is None else x_TI[rows]
    # The scale where the numbers are fewest.
    added_NO = ((x_NI @ pair.down_RI.T) * pair.scale) @ pair.up_OR.T
    if isinstance(rows, Tensor):
        out_TO.index_add_(0, rows, added_NO)
    else:
        out_TO[slice(None) if rows is None else rows] += added_NO
