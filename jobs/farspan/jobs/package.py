"""The running farspan as folders that Ray ships, so that a cluster runs the same code as the machine that submits.

Made from the package as it is imported, editable or installed. Ray names a folder by what is in it, so a cluster gets
every change, and what has not changed once. Not a wheel: Ray knows a wheel by its name alone, and where two jobs bring
a new one to a node at once, the second installs it over the first, fails, and takes the first one's away for good.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import farspan

_METADATA = "Metadata-Version: 2.1\nName: farspan\nVersion: {version}\n"


def lay_out(folder: Path) -> list[Path]:
    """Write the package and its metadata into `folder`; gives their two folders, for a job's `py_modules`.

    The metadata names no dependencies: they are the cluster's.
    """
    number = version("farspan")
    info = folder / f"farspan-{number}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(_METADATA.format(version=number), encoding="utf-8")
    for name, data in package_files():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return [folder / "farspan", info]


def package_files() -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every file of every root of the namespace, in a fixed order."""
    for root in sorted(farspan.__path__):
        for file in sorted(Path(root).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                yield f"farspan/{file.relative_to(root).as_posix()}", file.read_bytes()
