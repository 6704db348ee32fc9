"""The whole packed sequence, for layers that carry a state along a document.

Shapes: R ranks, t tokens a rank holds, T = R * t, L tokens of one document, E width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from farspan.parallel.exchange import Exchange
from farspan.parallel.layout import Layout
from farspan.parallel.switch import LayoutSwitch


@dataclass(frozen=True)
class WholeSequence:
    """Documents at `bounds` that lie over the ranks of `exchange` as `layout` says; without them, on this rank."""

    bounds: Sequence[int]
    exchange: Exchange | None = None
    layout: Layout | None = None

    @property
    def rank(self) -> int:
        return 0 if self.exchange is None else self.exchange.rank

    @property
    def num_ranks(self) -> int:
        return 1 if self.exchange is None else self.exchange.num_ranks

    def to_channels(self, x_tRX: Tensor) -> Tensor:
        """[t, R, X], row r for rank r -> [T, 1, X]: what every rank had for this one, in the order of the sequence."""
        switch = self._switch
        return x_tRX if switch is None else switch.to_channels(x_tRX)

    def to_tokens(self, x_T1X: Tensor) -> Tensor:
        """[T, 1, X] -> [t, R, X]: back to this rank's tokens."""
        switch = self._switch
        return x_T1X if switch is None else switch.to_tokens(x_T1X)

    @property
    def _switch(self) -> LayoutSwitch | None:
        if self.exchange is None or self.layout is None:
            return None
        return LayoutSwitch(self.exchange, self.layout)

    def documents(self, x_tE: Tensor) -> list[Tensor]:
        """Every document [L, E], in order. Collective; gradients are summed over ranks on their way back."""
        x_TE = self._gather(x_tE)
        assert self.bounds[-1] == x_TE.shape[0], "documents cover the sequence"
        return [x_TE[a:b] for a, b in pairwise(self.bounds) if b > a]

    def held(self, x_TE: Tensor) -> Tensor:
        """[t, E]: this rank's tokens."""
        if self.exchange is None or self.layout is None:
            return x_TE
        return self.layout.take(x_TE, self.exchange.rank)

    def _gather(self, x_tE: Tensor) -> Tensor:
        if self.exchange is None or self.layout is None:
            return x_tE
        # Everybody sends its tokens to everybody; backward sends each gradient home, where expand sums them.
        rows_RtE = self.exchange.all_to_all(x_tE.expand(self.exchange.num_ranks, *x_tE.shape))
        return rows_RtE.flatten(0, 1).index_select(0, self.layout.inverse().to(x_tE.device))
