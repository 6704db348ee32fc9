"""A node's environment out of one that its image holds: the same packages, this project's wheel on top, no download.

Run by the image's Python during setup: `/image/bin/python -m farspan.cluster.image FOLDER WHEEL NAME==VERSION...`
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[\w,]+\])?==([\w.]+)")
_RAY = """#!{python}
import sys
from ray.scripts.scripts import main
sys.exit(main())
"""


def missing(requirements: Sequence[str]) -> list[str]:
    """Those of NAME[EXTRAS]==VERSION that this Python does not hold, each with what it holds instead."""
    found = []
    for requirement in requirements:
        match = _REQUIREMENT.fullmatch(requirement)
        if match is None:
            found.append(f"{requirement} (not NAME==VERSION)")
            continue
        name, wanted = match.groups()
        try:
            held = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{requirement} (not there)")
            continue
        # Builds without CUDA count as the same version.
        if held.partition("+")[0] != wanted:
            found.append(f"{requirement} (it is {held})")
    return found


def stand_on(folder: Path, wheel: Path) -> Path:
    """Make or refresh an environment in `folder`: `wheel` first, then what this Python sees. Gives its Python."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    python = folder / "bin" / "python"
    places = {"base": str(folder), "platbase": str(folder)}
    own = Path(sysconfig.get_path("purelib", vars=places))
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(own)
    below = sysconfig.get_path("purelib")
    # As a site folder, so that editable installs of the image are seen as well.
    (own / "image.pth").write_text(f"import site; site.addsitedir({below!r})\n", encoding="utf-8")
    script = folder / "bin" / "ray"
    script.write_text(_RAY.format(python=python), encoding="utf-8")
    script.chmod(0o755)
    return python


def main(arguments: Sequence[str]) -> str | None:
    """What is wrong, in one sentence, or nothing."""
    folder, wheel, *requirements = arguments
    if wrong := missing(requirements):
        return f"the image's environment {sys.prefix} lacks {', '.join(wrong)}; install them, or leave out environment="
    stand_on(Path(folder), Path(wheel))
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
