"""How much of each layer to swap and how much to compute again: MEMO's linear program, and a clock to check it by.

A layer keeps for backward its input X, the output O of its attention, and the rest. X and O always go to the host;
attention, which is quadratic, is never computed twice. Of the rest, a share alpha of the tokens goes along, and the
other tokens are computed again, token by token. alpha is the largest for which the copies hide behind the computation
of one layer and the host has room:

    max alpha   s.t.  (X + O + alpha * rest) / bandwidth <= forward_s
                      (layers - kept) * (X + O + alpha * rest) <= host_bytes
                      0 <= alpha <= 1

Source: MEMO (Zhao et al. 2024, https://arxiv.org/abs/2407.12117), section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from farspan.errors import PlanError

# The last layers stay: backward begins with them.
_NUM_KEPT = 2


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One decoder layer of one sequence: bytes it keeps for backward, and seconds it computes."""

    input_bytes: int
    attention_bytes: int
    rest_bytes: int
    forward_s: float
    backward_s: float

    def swapped_bytes(self, alpha: float) -> float:
        return self.input_bytes + self.attention_bytes + alpha * self.rest_bytes


@dataclass(frozen=True, slots=True)
class MemoChoice:
    """`stall_s`: seconds each layer waits for the bus in forward even at this alpha; 0 when the program is feasible."""

    alpha: float
    stall_s: float
    host_bytes: int
    reason: str


def choose_alpha(
    layer: LayerCost, num_layers: int, bytes_per_s: float, host_bytes: int, num_kept: int = _NUM_KEPT
) -> MemoChoice:
    """The optimum, in closed form: one variable, two upper bounds.

    Raises:
        PlanError: not even X and O of the swapped layers fit on the host.
    """
    num_swapped = max(0, num_layers - num_kept)
    fixed = layer.swapped_bytes(0.0)
    if num_swapped * fixed > host_bytes:
        raise PlanError(
            f"memory.tiers: the inputs and attention outputs of {num_swapped} layers must fit on the host, they are "
            f"{num_swapped * fixed:.0f} bytes and it has {host_bytes}; give it more, or split the sequence further"
        )
    by_time = _bound(layer.forward_s * bytes_per_s - fixed, layer.rest_bytes)
    by_room = _bound(host_bytes / num_swapped - fixed, layer.rest_bytes) if num_swapped else 1.0
    alpha = max(0.0, min(1.0, by_time, by_room))
    stall_s = fixed / bytes_per_s - layer.forward_s if by_time < 0 else 0.0
    if by_time < 0:
        reason = "X and O alone take longer to copy than a layer computes"
    elif alpha == 1.0:
        reason = "everything is copied while a layer computes, and the host has room for it"
    else:
        reason = "bandwidth limits it" if by_time <= by_room else "the host's room limits it"
    return MemoChoice(alpha, stall_s, round(num_swapped * layer.swapped_bytes(alpha)), reason)


def in_hundredths(alpha: float) -> float:
    """A share a user can write, and no larger than `alpha`."""
    return math.floor(alpha * 100) / 100


def simulate_stall(
    layer: LayerCost, num_layers: int, alpha: float, bytes_per_s: float, num_kept: int = _NUM_KEPT
) -> float:
    """Seconds the computation of one step waits for copies, with two buffers that layers use in turn.

    Forward: a layer may begin once the layer two before it has left its buffer. Backward: a layer may begin once it is
    back, and its copy may begin once the layer two after it has given its buffer up.
    """
    copy_s = layer.swapped_bytes(alpha) / bytes_per_s
    num_swapped = max(0, num_layers - num_kept)
    now = bus = stall = 0.0
    left: list[float] = []
    for index in range(num_layers):
        if index >= 2 and index - 2 < num_swapped:
            stall += max(0.0, left[index - 2] - now)
            now = max(now, left[index - 2])
        now += layer.forward_s
        if index < num_swapped:
            bus = max(bus, now) + copy_s
            left.append(bus)
    ended: dict[int, float] = {}
    begun = now
    for index in reversed(range(num_layers)):
        if index < num_swapped:
            # Its buffer is free when the layer two after it is done; the last swapped ones start with backward.
            bus = max(bus, ended.get(index + 2, begun)) + copy_s
            stall += max(0.0, bus - now)
            now = max(now, bus)
        now += layer.backward_s
        ended[index] = now
    return stall


def _bound(room: float, per_alpha: int) -> float:
    return room / per_alpha if per_alpha else (1.0 if room >= 0 else -1.0)
