"""What processes of a run read before they begin is small: on a restart everybody waits for it."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["farspan.jobs.worker", "farspan.jobs.mailbox"])
def test_what_rays_processes_read_of_a_run_imports_neither_torch_nor_ray(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'ray', 'torch', 'transformers', 'pyarrow'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == "[]"


def test_what_the_controller_reads_of_a_run_imports_nothing_of_training() -> None:
    code = "import sys, farspan.jobs.attempt; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == "[]"
