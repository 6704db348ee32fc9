"""The wheel a cluster gets is the code that submits."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests.support.corpus import REPOSITORY

from farspan.jobs.wheel import build_wheel, package_files

ROOTS = ("platform", "kernels", "serve", "jobs")


def test_the_shipped_wheel_holds_every_source_file_of_the_four_roots(tmp_path: Path) -> None:
    sources = {
        str(file.relative_to(REPOSITORY / root))
        for root in ROOTS
        for file in (REPOSITORY / root / "farspan").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(build_wheel(tmp_path)) as wheel:
        # An installed farspan also holds the configs that ship with it.
        beside = (".dist-info/", "farspan/cli/shipped/")
        names = {name for name in wheel.namelist() if not any(part in name for part in beside)}
        assert names == sources
        assert wheel.testzip() is None


def test_the_same_code_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert build_wheel(tmp_path / "a").read_bytes() == build_wheel(tmp_path / "b").read_bytes()


def test_other_code_has_another_name_because_a_cluster_knows_a_wheel_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = build_wheel(tmp_path)
    assert build_wheel(tmp_path).name == before.name
    changed = [*package_files(), ("farspan/added.py", b"")]
    monkeypatch.setattr("farspan.jobs.wheel.package_files", lambda: iter(changed))
    assert build_wheel(tmp_path).name != before.name


def test_the_shipped_wheel_installs_and_imports_without_this_checkout(tmp_path: Path) -> None:
    wheel, target = build_wheel(tmp_path), tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True, timeout=120)
    script = f"import sys; sys.path.insert(0, {str(target)!r}); import farspan.errors as e; print(e.__file__)"
    answer = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert answer.stdout.strip() == str(target / "farspan" / "errors.py")


def test_package_files_leave_out_compiled_caches() -> None:
    assert not [name for name, _ in package_files() if "__pycache__" in name]
