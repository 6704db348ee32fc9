"""Commands that a test machine may not have, as stand-ins that do nothing."""

from __future__ import annotations

from pathlib import Path


def stand_ins(folder: Path, names: tuple[str, ...] = ("ssh", "rsync")) -> Path:
    """A folder for PATH with such commands, where it does not hold them yet."""
    folder.mkdir(exist_ok=True)
    for name in names:
        if not (folder / name).exists():
            (folder / name).write_text("#!/bin/sh\nexit 255\n", encoding="ascii")
            (folder / name).chmod(0o755)
    return folder
