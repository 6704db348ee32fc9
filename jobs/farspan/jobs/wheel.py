"""The running farspan as one wheel, so that a cluster runs the same code as the machine that submits.

Made from the package as it is imported, editable or installed. It names no dependencies: they are the cluster's, and
a wheel that named them would have every worker download them again.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import farspan

_METADATA = "Metadata-Version: 2.1\nName: farspan\nVersion: {version}\n"
_WHEEL = "Wheel-Version: 1.0\nGenerator: farspan\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def build_wheel(folder: Path) -> Path:
    """Write the wheel into `folder`; gives its path. The same code gives the same bytes."""
    number = version("farspan")
    info = f"farspan-{number}.dist-info"
    contents = dict(package_files())
    contents[f"{info}/METADATA"] = _METADATA.format(version=number).encode()
    contents[f"{info}/WHEEL"] = _WHEEL.encode()
    record = "".join(f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in contents.items())
    contents[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    # Ray knows a wheel by its name alone: other code under the same number must have another one, or a cluster that
    # has seen this number runs the code it saw first. A build tag begins with a digit.
    build = hashlib.sha256(record.encode()).hexdigest()[:16]
    path = folder / f"farspan-{number}-0x{build}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return path


def package_files() -> Iterator[tuple[str, bytes]]:
    """(name inside the wheel, bytes) of every file of every root of the namespace, in a fixed order."""
    for root in sorted(farspan.__path__):
        for file in sorted(Path(root).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                yield f"farspan/{file.relative_to(root).as_posix()}", file.read_bytes()


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
