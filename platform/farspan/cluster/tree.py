"""Every file that is rendered from a spec, written and compared."""

from __future__ import annotations

from pathlib import Path

from farspan.cluster.diagnose import cannot_write
from farspan.cluster.kubernetes import render_kubernetes
from farspan.cluster.launcher import render_launcher
from farspan.config.cluster import ClusterSpec
from farspan.errors import NotFoundError, StorageError

LAUNCHER_FILES = {"aws": "ray_cluster.yaml", "gcp": "infra/clusters/gcp.yaml", "local": "infra/clusters/local.yaml"}


def render_tree(spec: ClusterSpec) -> dict[str, str]:
    """Path, from the repository root, to text of every rendered file."""
    return {
        **{path: render_launcher(spec, provider) for provider, path in LAUNCHER_FILES.items()},
        **{f"infra/k8s/{path}": text for path, text in render_kubernetes(spec).items()},
    }


def write_tree(files: dict[str, str], root: Path) -> list[str]:
    """Write what differs; gives the paths written. Raises StorageError where a file cannot be written."""
    if not root.is_dir():
        raise NotFoundError(str(root), "no such folder to render into; create it first")
    written = []
    for path, text in files.items():
        target = root / path
        if _read(target) == text:
            continue
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        except OSError as problem:
            raise StorageError(str(target), f"{cannot_write(problem)}, or choose another --root") from None
        written.append(path)
    return written


def stale_files(files: dict[str, str], root: Path) -> list[str]:
    """Paths whose file is not what the spec renders, or is under infra/k8s and not rendered at all."""
    wrong = [path for path, text in files.items() if _read(root / path) != text]
    k8s = root / "infra" / "k8s"
    strays = {str(file.relative_to(root)) for file in k8s.rglob("*.yaml")} - set(files) if k8s.is_dir() else set()
    return sorted([*wrong, *strays])


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None
