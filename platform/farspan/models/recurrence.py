"""What a recurrent layer must tell so that its heads can be computed on different ranks.

Shapes: t tokens a rank holds, L tokens of one document, E model width, K units of a layer, U = ceil(K / R) units of one
rank, X numbers of a token and unit, S numbers of a token that every unit reads, C numbers a unit puts out.

A unit is the smallest set of heads that needs nothing of the others (a key head with its value heads). Projections
before and after work on tokens alone; what lies between (short convolution, recurrence) works on units alone. That
middle is transformers' own code: a shallow copy of the module (`part_of`) whose sizes and weights are those of the
rank's units, whose projections only cut what arrived, and whose tail hands its input on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class UnitSizes:
    """A layer in units: what of a token travels to the rank that computes a unit, and back."""

    num_units: int
    in_numbers: int
    """X: numbers of one token and unit."""
    shared_numbers: int
    """S: numbers of one token that every rank needs."""
    out_numbers: int
    """C: numbers one unit gives for one token."""
    wide_out: bool = False
    """What comes back is fp32 (or wider) whatever the compute type."""

    def units_per_rank(self, num_ranks: int) -> int:
        """U: the last ranks may hold padding."""
        return -(-self.num_units // num_ranks)


class Recurrence(Protocol):
    """One layer's module, seen as projections around units."""

    @property
    def sizes(self) -> UnitSizes: ...

    def project(self, hidden_tE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(units_tKX, shared_tS, gate_t...) of these tokens; the gate stays with its tokens."""
        ...

    def part(self, units_U: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """(x_LUX, shared_LS) of one document -> out_LUC, for the units numbered `units_U`."""
        ...

    def finish(self, out_tKC: Tensor, gate: Tensor) -> Tensor:
        """[t, E]: norm, gate and the projection back."""
        ...


def units_of_rank(sizes: UnitSizes, rank: int, num_ranks: int, device: torch.device) -> Tensor:
    """units_U of `rank`; padding repeats the last unit, whose inputs there are zeros and whose result nobody reads."""
    share = sizes.units_per_rank(num_ranks)
    return torch.arange(rank * share, (rank + 1) * share, device=device).clamp(max=sizes.num_units - 1)


def rows_of_units(weight: Tensor, num_units: int, units_U: Tensor) -> Tensor:
    """The rows of `weight` [K * n, ...] that belong to these units: [U * n, ...]."""
    return weight.unflatten(0, (num_units, -1)).index_select(0, units_U).flatten(0, 1)


@dataclass(frozen=True, slots=True)
class Weights:
    """A weight and a bias in the place of a module of which only these are read."""

    weight: Tensor
    bias: Tensor | None


def part_of(mixer: nn.Module, values: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """The forward of `mixer`'s class, [1, L, anything] -> [1, L, anything], with other attributes.

    The module itself is not touched. Fused training kernels that skip the replaced parts are left out.
    """
    part = copy.copy(mixer)
    vars(part).update(values, training=False)
    own_forward: Callable[..., Tensor] = type(mixer).forward
    return lambda x: own_forward(part, x)


def parts_named(mixer: nn.Module) -> frozenset[str]:
    """Names of a mixer's weights and modules; activations left out."""
    return frozenset((*mixer._parameters, *mixer._buffers, *mixer._modules)) - {"act"}
