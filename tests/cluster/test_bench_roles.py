"""The bench of roles over an endpoint of Ray Serve: roles follow a load that turns round, nothing is lost or wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own: the bench starts and stops a Ray, and this session has one.
_SHORT = """
import json
from farspan.jobs.launch import local_ray
from farspan.serve.bench_flip import Flip
from farspan.serve.bench_roles import RolesBench, bench_roles
if __name__ == "__main__":
    flip = Flip(half_s=10.0, load=0.4, long_prompt=(128, 256), long_answer=(32, 64), burst=4)
    with local_ray(2):
        print(json.dumps(bench_roles(RolesBench(flip=flip, threads=1))))
"""


@pytest.mark.long
def test_roles_follow_a_load_that_turns_round_and_every_answer_is_that_of_fixed_roles() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SHORT], cwd=Path.home(), stdout=subprocess.PIPE, text=True, timeout=560, check=True
    )
    fixed, following = json.loads(done.stdout.strip().splitlines()[-1])
    assert (fixed["roles"], following["roles"]) == ("fixed", "following the load")
    assert fixed["requests"] == following["requests"] > 0
    assert (fixed["lost"], following["lost"]) == (0, 0)
    # Lost requests, other answers than those of fixed roles, and roles that never change are wrong.
    assert "wrong" not in following
    assert fixed["role changes"] == 0
    assert following["role changes"] > 0
    assert fixed["tokens_per_s"] > 0
    assert following["tokens_per_s"] > 0
