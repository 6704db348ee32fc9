"""`farspan bench`: measure this machine against the best peer on the same work."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import typer

from farspan.config.load import nearest
from farspan.errors import ConfigError


def run_bench(what: str, *, as_json: bool) -> None:
    """Print the rows of one bench, or of all."""
    from farspan.kernels.attention.bench import bench_attention
    from farspan.parallel.bench import bench_parallel

    benches: dict[str, Callable[[], list[dict[str, Any]]]] = {"attention": bench_attention, "parallel": bench_parallel}
    if what != "all" and what not in benches:
        raise ConfigError("bench", f"must be all or one of {', '.join(benches)}", what, nearest(what, list(benches)))
    chosen = benches if what == "all" else {what: benches[what]}
    results = {name: bench() for name, bench in chosen.items()}
    if as_json:
        typer.echo(json.dumps(results))
        return
    for name, rows in results.items():
        typer.echo(name)
        for row in rows:
            typer.echo("  " + "  ".join(f"{key} {_text(value)}" for key, value in row.items()))


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
