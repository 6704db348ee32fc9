"""What a cluster gets is the code that submits."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import get_uri_for_directory
from tests.support.corpus import REPOSITORY

from farspan.jobs.package import lay_out, package_files

ROOTS = ("platform", "kernels", "serve", "jobs")


def test_what_is_shipped_holds_every_source_file_of_the_four_roots(tmp_path: Path) -> None:
    sources = {
        str(file.relative_to(REPOSITORY / root))
        for root in ROOTS
        for file in (REPOSITORY / root / "farspan").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    package, _ = lay_out(tmp_path)
    names = {str(file.relative_to(tmp_path)) for file in package.rglob("*") if file.is_file()}
    # An installed farspan also holds the configs that ship with it.
    assert {name for name in names if not name.startswith("farspan/cli/shipped/")} == sources


def test_a_cluster_gets_every_change_and_the_same_code_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def uris(name: str) -> list[str]:
        (tmp_path / name).mkdir()
        return [get_uri_for_directory(str(folder), include_gitignore=True) for folder in lay_out(tmp_path / name)]

    before = uris("a")
    assert uris("b") == before
    changed = [*package_files(), ("farspan/added.py", b"")]
    monkeypatch.setattr("farspan.jobs.package.package_files", lambda: iter(changed))
    package, info = uris("c")
    assert package != before[0]
    assert info == before[1]


def test_what_is_shipped_imports_and_knows_its_version_without_this_checkout(tmp_path: Path) -> None:
    lay_out(tmp_path)
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import importlib.metadata as m, farspan.errors as e; "
        "print(e.__file__, m.version('farspan'))"
    )
    answer = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert answer.stdout.split() == [str(tmp_path / "farspan" / "errors.py"), version("farspan")]


def test_package_files_leave_out_compiled_caches() -> None:
    assert not [name for name, _ in package_files() if "__pycache__" in name]
