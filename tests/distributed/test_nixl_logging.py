"""A process whose pages travel by NIXL keeps the log it had."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nixl")

# As Ray Serve's replicas log: records are kept back for a file.
_REPLICA = """
import logging, logging.handlers, sys
file = logging.FileHandler(sys.argv[1])
buffer = logging.handlers.MemoryHandler(1000, target=file)
logging.getLogger("replica").addHandler(buffer)
logging.getLogger("replica").error("before")

from farspan.kv.transports.nixl import make_agent
assert "nixl._api" not in sys.modules
make_agent("a")
assert "nixl._api" in sys.modules

logging.getLogger("replica").error("after")
buffer.flush()
assert buffer.target is file
assert logging.raiseExceptions
"""


def test_loading_nixl_leaves_the_log_of_its_process_alone(tmp_path: Path) -> None:
    log = tmp_path / "replica.log"
    done = subprocess.run([sys.executable, "-c", _REPLICA, str(log)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert log.read_text(encoding="utf-8").split() == ["before", "after"]
