"""The configs that ship with farspan: beside the code in a checkout, inside the package in a wheel."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from farspan.errors import ConfigError, NotFoundError


def apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(files, overrides) of a command line that takes several configs. Raises ConfigError where no file is named."""
    files = [word for word in words if "=" not in word or Path(word).is_file()]
    if not files:
        raise ConfigError("CONFIG", "must name a config file", words[0], "write it before the overrides")
    return files, [word for word in words if word not in files]


def shipped_config(name: str) -> str:
    """Path of a config of jobs/configs, serve/configs or infra, relative to the working folder if it lies there."""
    here = Path(__file__).resolve()
    roots = [here.parents[3] / "jobs" / "configs", here.parents[3] / "serve" / "configs", here.parents[3] / "infra"]
    roots.append(here.parent / "shipped")
    for root in roots:
        if (root / name).is_file():
            path = root / name
            return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
    raise NotFoundError(name, f"is not among the configs of {sys.prefix}; install farspan again")
