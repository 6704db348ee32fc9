"""A Ray of our own ends with whoever started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

DEADLINE_S = 120.0

INSIDE = """
import signal, time
from farspan.jobs.launch import local_ray

def interrupt(_signal, _frame):
    raise KeyboardInterrupt

signal.signal(signal.SIGTERM, interrupt)
try:
    with local_ray(1):
        print("up", flush=True)
        time.sleep(3600)
except KeyboardInterrupt:
    print("unwound", flush=True)
"""


def test_sigterm_means_what_it_meant_before_ray_was_started() -> None:
    process = subprocess.Popen([sys.executable, "-c", INSIDE], stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=DEADLINE_S)[0] == "unwound\n"
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait(DEADLINE_S)
