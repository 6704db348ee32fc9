"""KubeRay's schemas, where they were put into `.cache` of this checkout, and manifests as kustomize composes them."""

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
# The CRDs of KubeRay 1.7, YAML or JSON; not part of this project. infra/README.md says where they come from.
FOLDER = REPOSITORY / ".cache" / "kuberay-1.7"
_DEADLINE_S = 120.0


@functools.cache
def kuberay_schemas() -> Schemas:
    """Strict schemas of KubeRay 1.7, or a loud skip."""
    schemas = {key: schema for file in sorted(FOLDER.glob("*")) for key, schema in read_schemas(file).items()}
    if not schemas:
        pytest.skip(
            "KubeRay's CRDs are not in .cache/kuberay-1.7 of this checkout: manifests are held against no schema"
        )
    return schemas


@functools.cache
def kustomize(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl kustomize` makes of a folder, or a loud skip."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: overlays are not composed")
    command = ["kubectl", "kustomize", str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    assert answer.returncode == 0, answer.stderr
    return [document for document in yaml.load_all(answer.stdout, Loader=yaml.CSafeLoader) if document]
