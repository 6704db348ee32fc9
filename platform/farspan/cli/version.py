"""`farspan version`."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version

import typer

_STANDS_ON = ("farspan", "ray", "torch", "transformers", "tokenizers", "pyarrow", "nixl", "safetensors")


def show_version(*, as_json: bool) -> None:
    """Print one line per package, or JSON."""
    versions = {"python": platform.python_version(), **{name: _version(name) for name in _STANDS_ON}}
    if as_json:
        typer.echo(json.dumps(versions))
        return
    for name, number in versions.items():
        typer.echo(f"{name:14} {number}")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
