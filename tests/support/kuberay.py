"""KubeRay's schemas, where this checkout has them beside it, and manifests as kustomize composes them."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from farspan.cluster.schemas import Schemas, read_schemas

REPOSITORY = Path(__file__).resolve().parents[2]
# Derived from the CRDs of KubeRay 1.7.0 (github.com/ray-project/kuberay, Apache-2.0); not part of this project.
_FILE = Path("shared/data/kuberay-1.7.0-schemas.json.gz")
_PLACES = (REPOSITORY, REPOSITORY.parent, REPOSITORY.parent.parent)
_DEADLINE_S = 120.0


@functools.cache
def kuberay_schemas() -> Schemas:
    """Strict schemas of KubeRay 1.7, or a loud skip."""
    for place in _PLACES:
        if (place / _FILE).is_file():
            return read_schemas(place / _FILE)
    pytest.skip(f"KubeRay's schemas are not beside this checkout ({_FILE}): manifests are held against no schema")


@functools.cache
def kustomize(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl kustomize` makes of a folder, or a loud skip."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: overlays are not composed")
    command = ["kubectl", "kustomize", str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    assert answer.returncode == 0, answer.stderr
    return [document for document in yaml.load_all(answer.stdout, Loader=yaml.CSafeLoader) if document]
