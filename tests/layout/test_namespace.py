"""The house keeps its shape: one namespace package over four roots, and nothing that shadows the standard library."""

import platform
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ROOTS = ("platform", "kernels", "serve", "jobs")


def test_no_root_is_a_package_of_its_own() -> None:
    strays = [
        str(p.relative_to(REPOSITORY))
        for root in ROOTS
        for p in (REPOSITORY / root / "__init__.py", REPOSITORY / root / "farspan" / "__init__.py")
        if p.exists()
    ]
    assert strays == []


def test_no_name_under_farspan_has_two_roots() -> None:
    owners: dict[str, list[str]] = {}
    for root in ROOTS:
        for entry in (REPOSITORY / root / "farspan").iterdir():
            if entry.suffix == ".py" or (entry.is_dir() and entry.name != "__pycache__"):
                owners.setdefault(entry.stem, []).append(root)
    assert {name: roots for name, roots in owners.items() if len(roots) > 1} == {}


def test_every_room_says_that_it_is_typed() -> None:
    rooms = [
        p for root in ROOTS for p in (REPOSITORY / root / "farspan").iterdir() if p.is_dir() and p.name != "__pycache__"
    ]
    assert rooms
    assert [str(r) for r in rooms if not (r / "py.typed").exists()] == []


def test_the_standard_platform_module_is_not_shadowed_in_pytest() -> None:
    assert platform.python_version() == ".".join(map(str, sys.version_info[:3]))


def test_the_standard_platform_module_is_not_shadowed_at_the_repository_root() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.python_version())"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert answer.stdout.strip() == platform.python_version()


def test_the_top_level_is_the_one_on_the_card() -> None:
    for name in (
        "platform",
        "jobs",
        "serve",
        "kernels",
        "infra",
        "tests",
        "ray_cluster.yaml",
        "pyproject.toml",
    ):
        assert (REPOSITORY / name).exists(), name
