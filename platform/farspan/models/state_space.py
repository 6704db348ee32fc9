"""Mamba-2 layers of hybrid decoders (Bamba, Granite 4, Zamba 2) by heads.

Shapes: t tokens a rank holds, L tokens of one document, E model width, H heads of P numbers, G groups of heads that
read one B and one C of N numbers, K units of the layer, U of one rank.
With one group a unit is a head, and every rank gets the layer's B and C; else a unit is a group with its own.
Source: Dao and Gu 2024, https://arxiv.org/abs/2405.21060; transformers' models/bamba.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from farspan.models.recurrence import Recurrence, UnitSizes, Weights, part_of, parts_named, rows_of_units

_PARTS = frozenset(("conv1d", "in_proj", "dt_bias", "A_log", "norm", "D", "out_proj"))


def state_space(mixer: nn.Module) -> Recurrence | None:
    """`mixer` in units, if its parts are those of a Mamba-2 layer."""
    if parts_named(mixer) != _PARTS or not hasattr(mixer, "n_groups"):
        return None
    return _StateSpace(mixer)


@dataclass(frozen=True)
class _StateSpace:
    mixer: Any

    @property
    def sizes(self) -> UnitSizes:
        mixer, states = self.mixer, 2 * self.mixer.ssm_state_size
        heads = self._heads
        own = 0 if self._one_group else states
        shared = states if self._one_group else 0
        return UnitSizes(self._units, heads * (mixer.head_dim + 1) + own, shared, heads * mixer.head_dim, wide_out=True)

    @property
    def _one_group(self) -> bool:
        return bool(self.mixer.n_groups == 1)

    @property
    def _units(self) -> int:
        return int(self.mixer.num_heads if self._one_group else self.mixer.n_groups)

    @property
    def _heads(self) -> int:
        """Heads of a unit."""
        return int(self.mixer.num_heads // self._units)

    def project(self, hidden_tE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixer = self.mixer
        gate_tW, x_tW, b_tN, c_tN, dt_tH = mixer.in_proj(hidden_tE).split(
            [mixer.intermediate_size, *self._conv_widths, mixer.num_heads], dim=1
        )
        own = (x_tW, dt_tH) if self._one_group else (x_tW, dt_tH, b_tN, c_tN)
        units_tKX = torch.cat([x.unflatten(1, (self._units, -1)) for x in own], dim=2)
        shared_tS = torch.cat([b_tN, c_tN], dim=1) if self._one_group else hidden_tE[:, :0]
        return units_tKX, shared_tS, gate_tW

    def part(self, units_U: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        mixer, num_units = self.mixer, len(units_U)
        num_heads = num_units * self._heads
        groups = 1 if self._one_group else num_units
        width, states = num_heads * mixer.head_dim, groups * mixer.ssm_state_size
        run = part_of(
            mixer,
            {
                "num_heads": num_heads,
                "n_groups": groups,
                "intermediate_size": width,
                "conv_dim": width + 2 * states,
                "conv1d": Weights(self._conv(mixer.conv1d.weight, units_U), self._bias(units_U)),
                **{
                    name: rows_of_units(getattr(mixer, name), self._units, units_U)
                    for name in ("A_log", "dt_bias", "D")
                },
                "in_proj": lambda x: x,
                "norm": lambda out, _gate: out,
                "out_proj": lambda out: out,
            },
        )
        own = [self._heads * mixer.head_dim, self._heads]
        widths = own if self._one_group else [*own, mixer.ssm_state_size, mixer.ssm_state_size]

        def of_document(x_LUX: Tensor, shared_LS: Tensor) -> Tensor:
            x, dt, *bc = (part.flatten(1) for part in x_LUX.split(widths, dim=2))
            # The gate stayed with its tokens: x takes its room, and nobody reads it.
            projected = torch.cat([x, x, *(bc or [shared_LS]), dt], dim=1)
            return run(projected.unsqueeze(0))[0].unflatten(1, (num_units, -1))

        return of_document

    def finish(self, out_tKC: Tensor, gate: Tensor) -> Tensor:
        normed = self.mixer.norm(out_tKC.flatten(1), gate)
        result: Tensor = self.mixer.out_proj(normed.to(gate.dtype))
        return result

    @property
    def _conv_widths(self) -> list[int]:
        """Channels of x, B and C in the short convolution."""
        states = self.mixer.n_groups * self.mixer.ssm_state_size
        return [self.mixer.intermediate_size, states, states]

    def _conv(self, rows: Tensor, units_U: Tensor) -> Tensor:
        x, b, c = rows.split(self._conv_widths)
        if not self._one_group:
            b, c = (rows_of_units(part, self._units, units_U) for part in (b, c))
        return torch.cat([rows_of_units(x, self._units, units_U), b, c])

    def _bias(self, units_U: Tensor) -> Tensor | None:
        bias = self.mixer.conv1d.bias
        return None if bias is None else self._conv(bias, units_U)
