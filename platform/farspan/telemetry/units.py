"""Numbers as people read them: a few digits and the unit that fits."""

from __future__ import annotations

import math


def number(value: float, digits: int = 3) -> str:
    """`digits` significant digits, thousands separated; integers stay whole."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("+inf" if value > 0 else "-inf")
    if isinstance(value, int) or value == 0 or abs(value) >= 10**digits:
        return f"{value:,.0f}".replace(",", "\u202f")
    if abs(value) < 1e-3:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"


def byte_size(value: float) -> str:
    """Binary units: KiB, MiB, GiB, TiB."""
    scale, unit = byte_scale(value)
    return f"{number(value if scale == 1 else value / scale)} {unit}"


def byte_scale(largest: float) -> tuple[float, str]:
    """The unit in which values up to `largest` bytes read well, and its size."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = next((i for i in range(len(units)) if abs(largest) < 1024 ** (i + 1)), len(units) - 1)
    return 1024**power, units[power]


def time_scale(largest: float) -> tuple[float, str]:
    """The unit in which values up to `largest` seconds read well, and its size."""
    if abs(largest) >= 1:
        return 1.0, "s"
    return (1e-3, "ms") if abs(largest) >= 1e-3 else (1e-6, "µs")


def plural(how_many: int, noun: str) -> str:
    return f"{number(how_many)} {noun}" + ("" if how_many == 1 else "s")


def duration(seconds: float) -> str:
    """Microseconds to hours."""
    if not math.isfinite(seconds) or seconds == 0:
        return f"{number(seconds)} s"
    if abs(seconds) < 120:
        scale, unit = time_scale(seconds)
        return f"{number(seconds / scale)} {unit}"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def count(value: float) -> str:
    """Thousands and millions: 8192 -> 8.19 k."""
    for bound, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= bound:
            return f"{number(value / bound)} {suffix}"
    return number(value)
