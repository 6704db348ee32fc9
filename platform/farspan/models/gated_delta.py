"""Gated delta nets (Qwen3-Next, Qwen3.5, OLMo Hybrid) by key heads.

Shapes: t tokens a rank holds, L tokens of one document, E model width, K key heads of the layer, U of one rank,
N value heads of a key head, D head dim of q and k, C of v.
A unit is a key head with its N value heads; its numbers are q (D), k (D), v (N * C), beta (N), decay (N).
Source: Yang et al. 2024, https://arxiv.org/abs/2412.06464; transformers' models/qwen3_next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from farspan.models.recurrence import Recurrence, UnitSizes, Weights, part_of, parts_named, rows_of_units

_COMMON = frozenset(("conv1d", "A_log", "dt_bias"))
_FUSED = _COMMON | {"in_proj_qkvz", "in_proj_ba", "norm", "out_proj"}
_SPLIT = _COMMON | {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "norm", "out_proj"}
_APART = _COMMON | {"q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj", "o_norm", "o_proj"}


def gated_delta(mixer: nn.Module) -> Recurrence | None:
    """`mixer` in units, if its parts are those of a gated delta net."""
    styles: dict[frozenset[str], type[_GatedDelta]] = {_FUSED: _Fused, _SPLIT: _Split, _APART: _Apart}
    style = styles.get(parts_named(mixer))
    return None if style is None else style(mixer)


@dataclass(frozen=True)
class _GatedDelta(ABC):
    mixer: Any

    @property
    def sizes(self) -> UnitSizes:
        values = self._values * self.mixer.head_v_dim
        return UnitSizes(self.mixer.num_k_heads, 2 * self.mixer.head_k_dim + values + 2 * self._values, 0, values)

    @property
    def _values(self) -> int:
        """N: value heads of a key head."""
        return int(self.mixer.num_v_heads // self.mixer.num_k_heads)

    def part(self, units_U: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        mixer, num_units = self.mixer, len(units_U)
        key_dim, value_dim = num_units * mixer.head_k_dim, num_units * self._values * mixer.head_v_dim
        run = part_of(
            mixer,
            {
                "num_k_heads": num_units,
                "num_v_heads": num_units * self._values,
                "key_dim": key_dim,
                "value_dim": value_dim,
                "conv_dim": 2 * key_dim + value_dim,
                "conv1d": self._conv(units_U),
                "A_log": rows_of_units(mixer.A_log, mixer.num_k_heads, units_U),
                "dt_bias": rows_of_units(mixer.dt_bias, mixer.num_k_heads, units_U),
                **self._replaced(num_units),
            },
        )
        return lambda x_LUX, _shared: run(x_LUX.flatten(1).unsqueeze(0))[0].unflatten(1, (num_units, -1))

    def _conv(self, units_U: Tensor) -> Weights:
        conv, mixer = self.mixer.conv1d, self.mixer

        def held(rows: Tensor | None) -> Tensor | None:
            if rows is None:
                return None
            blocks = rows.split([mixer.key_dim, mixer.key_dim, mixer.value_dim])
            return torch.cat([rows_of_units(block, mixer.num_k_heads, units_U) for block in blocks])

        weight = held(conv.weight)
        assert weight is not None, "a convolution has weights"
        return Weights(weight, held(conv.bias))

    def _gated(self, out_tKC: Tensor, gate_tV: Tensor, norm: nn.Module, back: nn.Module) -> Tensor:
        """Norm and gate of every value head, then the projection back."""
        heads = out_tKC.reshape(-1, self.mixer.head_v_dim)
        normed = norm(heads, gate_tV.reshape(-1, self.mixer.head_v_dim))
        result: Tensor = back(normed.reshape(out_tKC.shape[0], -1))
        return result

    @abstractmethod
    def project(self, hidden_tE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(units_tKX, nothing shared, the gate)."""

    @abstractmethod
    def finish(self, out_tKC: Tensor, gate: Tensor) -> Tensor:
        """[t, E]: norm, gate and the projection back."""

    @abstractmethod
    def _replaced(self, num_units: int) -> dict[str, Any]:
        """What stands for the module's projections and tail in a part, which gets x [1, L, U * X]."""

    def _cut(self, num_units: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """x [1, L, U * X] -> q, k, v, beta, decay [1, L, U, ...]."""
        mixer, values = self.mixer, self._values
        widths = [mixer.head_k_dim, mixer.head_k_dim, values * mixer.head_v_dim, values, values]
        return lambda x: x.unflatten(2, (num_units, -1)).split(widths, dim=3)

    def _units(self, q: Tensor, k: Tensor, v: Tensor, b: Tensor, a: Tensor) -> Tensor:
        """units_tKX of five projections [t, K * n]."""
        return torch.cat([x.unflatten(1, (self.mixer.num_k_heads, -1)) for x in (q, k, v, b, a)], dim=2)


def _first(out: Tensor, _gate: Tensor) -> Tensor:
    return out


def _same(x: Tensor) -> Tensor:
    return x


class _Fused(_GatedDelta):
    """Qwen3-Next: two projections, key head by key head."""

    def project(self, hidden_tE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.mixer.num_k_heads
        qkvz_tKX, ba_tKX = (
            p(hidden_tE).unflatten(1, (heads, -1)) for p in (self.mixer.in_proj_qkvz, self.mixer.in_proj_ba)
        )
        values = self._values * self.mixer.head_v_dim
        qkv_tKX, gate_tKC = qkvz_tKX[:, :, :-values], qkvz_tKX[:, :, -values:]
        return torch.cat([qkv_tKX, ba_tKX], dim=2), hidden_tE[:, :0], gate_tKC

    def finish(self, out_tKC: Tensor, gate: Tensor) -> Tensor:
        return self._gated(out_tKC, gate, self.mixer.norm, self.mixer.out_proj)

    def _replaced(self, num_units: int) -> dict[str, Any]:
        cut = self._cut(num_units)

        def qkvz(x: Tensor) -> Tensor:
            q, k, v, *_ = cut(x)
            # The gate stayed with its tokens: v takes its room, and nobody reads it.
            return torch.cat([q, k, v, v], dim=3).flatten(2)

        def ba(x: Tensor) -> Tensor:
            return torch.cat(cut(x)[3:], dim=3).flatten(2)

        return {"in_proj_qkvz": qkvz, "in_proj_ba": ba, "norm": _first, "out_proj": _same}


class _Split(_GatedDelta):
    """Qwen3.5: q, k and v in one projection, the others apart."""

    def project(self, hidden_tE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixer = self.mixer
        q, k, v = mixer.in_proj_qkv(hidden_tE).split([mixer.key_dim, mixer.key_dim, mixer.value_dim], dim=1)
        units_tKX = self._units(q, k, v, mixer.in_proj_b(hidden_tE), mixer.in_proj_a(hidden_tE))
        return units_tKX, hidden_tE[:, :0], mixer.in_proj_z(hidden_tE)

    def finish(self, out_tKC: Tensor, gate: Tensor) -> Tensor:
        return self._gated(out_tKC, gate, self.mixer.norm, self.mixer.out_proj)

    def _replaced(self, num_units: int) -> dict[str, Any]:
        cut = self._cut(num_units)
        return {
            "in_proj_qkv": lambda x: torch.cat([part.flatten(2) for part in cut(x)[:3]], dim=2),
            "in_proj_z": lambda x: cut(x)[2].flatten(2),
            "in_proj_b": lambda x: cut(x)[3].flatten(2),
            "in_proj_a": lambda x: cut(x)[4].flatten(2),
            "norm": _first,
            "out_proj": _same,
        }


class _Apart(_GatedDelta):
    """OLMo Hybrid: every projection apart."""

    def project(self, hidden_tE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixer = self.mixer
        projections = (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.b_proj, mixer.a_proj)
        return self._units(*(p(hidden_tE) for p in projections)), hidden_tE[:, :0], mixer.g_proj(hidden_tE)

    def finish(self, out_tKC: Tensor, gate: Tensor) -> Tensor:
        return self._gated(out_tKC, gate, self.mixer.o_norm, self.mixer.o_proj)

    def _replaced(self, num_units: int) -> dict[str, Any]:
        cut = self._cut(num_units)

        def part(number: int) -> Callable[[Tensor], Tensor]:
            return lambda x: cut(x)[number].flatten(2)

        names = {"q_proj": 0, "k_proj": 1, "v_proj": 2, "b_proj": 3, "a_proj": 4, "g_proj": 2}
        return {**{name: part(number) for name, number in names.items()}, "o_norm": _first, "o_proj": _same}
