"""Shared fixtures, and the rule that a test leaves nothing behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

from tests.support.disk import small_disk
from tests.support.local_ray import LocalRay, start_local_ray
from tests.support.ranks import RankPool
from tests.support.s3 import s3, s3_server

__all__ = ["s3", "s3_server", "small_disk"]

# The same examples every time, and no opinion about how busy the machine is.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")

RAY_RUNS = pytest.StashKey[bool]()
# The shared Ray starts with the first test that needs it and then stays: what must be shown without one comes before.
_ORDER = ("layout", "unit", "kernels", "infra", "distributed", "cluster", "end_to_end")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the folders from the quickest answer to the slowest; inside a folder the order stays."""

    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(item.config.rootpath).parts[1]
        return _ORDER.index(folder) if folder in _ORDER else len(_ORDER)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`: one worker for everything with Ray."""
    from tests.support.one_ray import OneRayScheduling

    return OneRayScheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Four gloo ranks, shared by the session."""
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def ray_cluster(request: pytest.FixtureRequest) -> Iterator[LocalRay]:
    """One local Ray with dashboard and job server for every test that needs a cluster."""
    with start_local_ray() as cluster:
        request.session.stash[RAY_RUNS] = True
        yield cluster


@pytest.fixture(autouse=True)
def _leaves_nothing_behind() -> Iterator[None]:
    environment, threads = dict(os.environ), torch.get_num_threads()
    yield
    assert not torch.distributed.is_initialized(), "a process group was left behind"
    assert torch.get_num_threads() == threads, "the number of torch threads was changed"
    environment["PYTEST_CURRENT_TEST"] = os.environ.get("PYTEST_CURRENT_TEST", "")
    now = dict(os.environ)
    changed = {name for name in environment.keys() | now.keys() if environment.get(name) != now.get(name)}
    # The last two are set by torch's compiler and by accelerate (which peft imports) when they are first imported.
    allowed = {"PYTEST_CURRENT_TEST", "PYTEST_VERSION", "TORCHINDUCTOR_CACHE_DIR", "PYTORCH_NVML_BASED_CUDA_CHECK"}
    assert not changed - allowed, f"environment left changed: {sorted(changed)}"


@pytest.fixture(autouse=True)
def _no_ray_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    ray = sys.modules.get("ray")
    if ray is not None and not request.session.stash.get(RAY_RUNS, False):
        assert not ray.is_initialized(), "a Ray session was left behind"
