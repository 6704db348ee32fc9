"""How long clients waited, fault by fault."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Table:
    """The longest gap of every stream, for each row."""

    gaps_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, row: str, gaps_s: Iterable[float]) -> None:
        self.gaps_s[row] += gaps_s

    def __str__(self) -> str:
        lines = [f"{'longest gap of a stream, s':<28}{'streams':>8}{'p50':>8}{'p99':>8}"]
        for row, gaps_s in self.gaps_s.items():
            lines.append(f"{row:<28}{len(gaps_s):>8}{percentile(gaps_s, 50):>8.2f}{percentile(gaps_s, 99):>8.2f}")
        return "\n".join(lines)


def percentile(values: Iterable[float], percent: int) -> float:
    """The smallest of the values that so many percent of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
