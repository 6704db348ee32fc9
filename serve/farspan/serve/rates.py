"""How much of something comes in a second, and how large it usually is, lately. Clocks are arguments."""

from __future__ import annotations

import math


class Rate:
    """Amount per second over about the last `over_s` seconds."""

    def __init__(self, over_s: float, now_s: float) -> None:
        self._over_s, self._begun_s, self._at_s, self._amount = over_s, now_s, now_s, 0.0

    def add(self, amount: float, now_s: float) -> None:
        self._fade(now_s)
        self._amount += amount

    def per_s(self, now_s: float) -> float:
        self._fade(now_s)
        # What fades away has this weight in sum; at the beginning less time than that has passed.
        seen_s = self._over_s * -math.expm1(-(now_s - self._begun_s) / self._over_s)
        return self._amount / seen_s if seen_s > 0 else 0.0

    def _fade(self, now_s: float) -> None:
        passed_s = max(0.0, now_s - self._at_s)
        self._amount *= math.exp(-passed_s / self._over_s)
        self._at_s = max(self._at_s, now_s)


class Mean:
    """Running mean in which the newest value has `weight`."""

    def __init__(self, first: float, weight: float = 0.05) -> None:
        self.value, self._weight, self._seen = first, weight, False

    def add(self, value: float) -> None:
        self.value += (value - self.value) * (self._weight if self._seen else 1.0)
        self._seen = True


class Percentile:
    """A percentile that follows what comes: up by a large step when it is exceeded, down by a small one."""

    def __init__(self, percent: float, step: float = 0.1) -> None:
        self._share, self._step, self.value = percent / 100, step, 0.0

    def add(self, value: float) -> None:
        if self.value == 0.0:
            self.value = value
        elif value > self.value:
            self.value *= 1 + self._step * self._share
        else:
            self.value /= 1 + self._step * (1 - self._share)
