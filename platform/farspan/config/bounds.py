"""Bounds of one value: each raises one `ConfigError` that names the nearest legal one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from farspan.config.load import nearest
from farspan.errors import ConfigError


def one_of(field: str, value: str, known: Sequence[str]) -> None:
    """`value` is one of a few words."""
    if value not in known:
        raise ConfigError(field, f"must be one of {', '.join(known)}", value, nearest(value, list(known)))


def within(field: str, value: float, low: float, high: float) -> None:
    """`low` and `high` are legal themselves; what is not a number is not."""
    if not low <= value <= high:
        nearest_legal = min(max(value, low), high) if not math.isnan(value) else low
        raise ConfigError(field, f"must lie in {low:g}..{high:g}", value, f"use {field}={nearest_legal:g}")


def at_least(field: str, value: float, least: int) -> None:
    """A smallest legal value."""
    if value < least:
        raise ConfigError(field, f"must be at least {least}", value, f"use {field}={least}")


def above(field: str, value: float, bound: float) -> None:
    """`bound` itself is not legal."""
    if not value > bound:
        raise ConfigError(field, f"must be more than {bound:g}", value, f"use for example {field}={bound + 1:g}")


def multiple(field: str, value: int, of_field: str, of: int) -> None:
    """`value` is a multiple of another field."""
    if value % of != 0:
        raise ConfigError(
            field, f"must be a multiple of {of_field} ({of})", value, f"use {field}={-(-value // of) * of}"
        )


def divides(field: str, value: int, total_field: str, total: int) -> None:
    """`value` divides another field."""
    if total % value != 0:
        legal = max(d for d in range(1, value + 1) if total % d == 0)
        raise ConfigError(field, f"must divide {total_field} ({total})", value, f"use {field}={legal}")


def custom_resources(field: str, custom: dict[str, float]) -> None:
    """Amounts of resources that are not Ray's own."""
    for name, amount in custom.items():
        above(f"{field}.{name}", amount, 0)
        if name in ("CPU", "GPU", "memory", "object_store_memory"):
            raise ConfigError(f"{field}.{name}", "is not a custom resource", name, f"leave it out of {field}")
