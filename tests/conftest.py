"""Shared fixtures, and the rule that a test leaves nothing behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

from tests.support.ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Four gloo ranks, shared by the session."""
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _leaves_nothing_behind() -> Iterator[None]:
    environment, threads = dict(os.environ), torch.get_num_threads()
    yield
    assert not torch.distributed.is_initialized(), "a process group was left behind"
    assert torch.get_num_threads() == threads, "the number of torch threads was changed"
    environment["PYTEST_CURRENT_TEST"] = os.environ.get("PYTEST_CURRENT_TEST", "")
    now = dict(os.environ)
    changed = {name for name in environment.keys() | now.keys() if environment.get(name) != now.get(name)}
    # torch writes its cache folder there when its compiler is first imported beside triton.
    allowed = {"PYTEST_CURRENT_TEST", "PYTEST_VERSION", "TORCHINDUCTOR_CACHE_DIR"}
    assert not changed - allowed, f"environment left changed: {sorted(changed - allowed)}"


@pytest.fixture(autouse=True)
def _no_ray_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    ray = sys.modules.get("ray")
    if ray is not None and "ray_cluster" not in request.fixturenames:
        assert not ray.is_initialized(), "a Ray session was left behind"
