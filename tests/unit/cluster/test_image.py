"""A node's environment stands on the image's: the shipped wheel comes first, the rest is what the image holds."""

import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from farspan.cluster.image import main, missing


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "farspan-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("farspan/errors.py", "SHIPPED = 'yes'\n")
    return path


def test_what_the_image_holds_is_compared_with_what_is_pinned() -> None:
    held = version("jinja2")
    assert missing([f"jinja2=={held}", f"Jinja2[i18n]=={held}"]) == []
    assert missing(["jinja2==1.0"]) == [f"jinja2==1.0 (it is {held})"]
    assert missing(["no-such-package==1.0", "jinja2>=1"]) == [
        "no-such-package==1.0 (not there)",
        "jinja2>=1 (not NAME==VERSION)",
    ]


def test_a_build_for_cpus_counts_as_the_same_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.0+cpu")
    assert missing(["torch==2.13.0"]) == []


def test_the_nodes_environment_sees_the_wheel_first_and_then_the_image(tmp_path: Path, wheel: Path) -> None:
    folder = tmp_path / "env"
    # Twice: a node whose setup is run again.
    for _ in range(2):
        assert main([str(folder), str(wheel), f"jinja2=={version('jinja2')}"]) is None
    script = "import farspan.errors, jinja2, sys; print(farspan.errors.SHIPPED, jinja2.__name__, sys.prefix)"
    # Isolated: no PYTHONPATH of whoever runs the tests goes before the wheel.
    answer = subprocess.run(
        [folder / "bin" / "python", "-I", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.stdout.split() == ["yes", "jinja2", str(folder)], answer.stderr
    assert (folder / "bin" / "ray").read_text().startswith(f"#!{folder}/bin/python\n")


def test_an_image_with_other_versions_is_refused_before_anything_is_made(tmp_path: Path, wheel: Path) -> None:
    said = main([str(tmp_path / "env"), str(wheel), "ray[serve,train]==1.0"])
    assert said is not None
    assert said.startswith(f"the image's environment {sys.prefix} lacks ray[serve,train]==1.0 (it is ")
    assert not (tmp_path / "env").exists()
