"""Layout switch: one exchange between sequence-sharded and channel-sharded activations.

Shapes: R ranks, t tokens a rank holds, T = R * t, W channels (or heads), X anything behind them.
A recurrent layer (linear attention, state space, convolution) needs every token but treats channels alone; attention
strategies need every channel of a token. `to_channels` before such a layer and `to_tokens` after it are each other's
inverse, and each other's gradient.
Source: the dynamic switch of DSP (Zhao et al. 2024, https://arxiv.org/abs/2403.10266).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from farspan.parallel.exchange import Exchange
from farspan.parallel.layout import Layout
from farspan.parallel.traffic import Traffic


@dataclass(frozen=True)
class LayoutSwitch:
    """Between the token shards of `layout` and equal shards of channels, for one sequence."""

    exchange: Exchange
    layout: Layout

    def to_channels(self, x_tWX: Tensor) -> Tensor:
        """[t, W, ...] of this rank's tokens -> [T, W / R, ...]: all tokens, in the order of the sequence.

        Raises:
            ValueError: the channels cannot be cut into R equal parts.
        """
        num_ranks, channels = self.exchange.num_ranks, x_tWX.shape[1]
        if channels % num_ranks != 0:
            raise ValueError(
                f"a layout switch needs channels divisible by its ranks, got {channels} channels on {num_ranks} ranks; "
                f"pad to {-(-channels // num_ranks) * num_ranks}"
            )
        rows = self.exchange.all_to_all(x_tWX.unflatten(1, (num_ranks, -1)).transpose(0, 1))
        return rows.flatten(0, 1).index_select(0, self.layout.inverse().to(x_tWX.device))

    def to_tokens(self, x_TWX: Tensor) -> Tensor:
        """[T, W / R, ...] -> [t, W, ...]: back to this rank's tokens with all channels."""
        held = x_TWX.index_select(0, self.layout.order().to(x_TWX.device))
        rows = self.exchange.all_to_all(held.unflatten(0, (self.exchange.num_ranks, -1)))
        return rows.transpose(0, 1).flatten(1, 2)


def bytes_sent(num_tokens: int, num_channels: int, itemsize: int, num_ranks: int) -> Traffic:
    """One switch, one way, of t tokens with W channels (all trailing dims included) on each rank."""
    one_way = num_tokens * num_channels * itemsize * (num_ranks - 1) // num_ranks
    return Traffic(forward=one_way, backward=one_way)
