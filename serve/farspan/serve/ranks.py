"""The ranks of one worker: the replica itself leads, every other rank is an actor beside it in its placement group.

All of them are on one machine and speak over its loopback, which no other machine can join. The actors belong to the
replica: they end with it, however it ends.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from farspan.config.schema import RoleConfig, ServeConfig
from farspan.engine.cut import Share
from farspan.engine.follow import follow
from farspan.engine.gang import Gang
from farspan.errors import ClusterError, EngineError, FarspanError
from farspan.models.checkpoint import load_causal_lm
from farspan.models.folder import open_model_folder
from farspan.serve.object_store import open_transport

# Ranks compute the same at the same time: one that is so far behind is lost.
_DEADLINE_S = 60.0
_LOOPBACK = "127.0.0.1"
_READY_POLL_S = 0.2


def rank_options(role: RoleConfig, config: ServeConfig) -> dict[str, Any]:
    """What Ray Serve is told of a deployment whose replicas have several ranks: a bundle for each, on one machine."""
    if config.engine.tensor_parallel == 1:
        return {}
    each = {"CPU": role.cpus, "GPU": role.gpus}
    others = [each] * (config.engine.tensor_parallel - 1)
    bundles = [{name: amount for name, amount in one.items() if amount} for one in ({**each, **role.custom}, *others)]
    return {"placement_group_bundles": bundles, "placement_group_strategy": "STRICT_PACK"}


class Rank:
    """A process that computes what the leader tells it."""

    def __init__(self, config: ServeConfig, rank: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self._config, self._rank = config, rank

    def follow(self, port: int) -> None:
        """Until the leader ends the engine. Raises FarspanError when it cannot, or another rank is lost."""
        config = self._config
        store = _store(config, port, leads=False)
        model = load_causal_lm(open_model_folder(config.model), getattr(torch, config.engine.dtype))
        store.set(_ready(self._rank), "")
        share = Share.of(model, _form(config, store, self._rank))
        follow(on_device(model), config.engine, share, lambda pool: open_transport(config.transfer, pool).transport)


class Ranks:
    """The other ranks of a worker, for the one that leads."""

    def __init__(self, config: ServeConfig, role: RoleConfig, threads: int) -> None:
        """Start them; they load the model while the leader does. `threads`: CPU threads of each."""
        self._config = config
        self._store = _store(config, 0, leads=True)
        group = ray.util.get_current_placement_group()
        if group is None:
            raise ClusterError("a worker of several ranks needs a placement group with a bundle for each")
        numbers = range(1, config.engine.tensor_parallel)
        self._actors = [
            ray.remote(Rank)
            .options(
                num_cpus=role.cpus,
                num_gpus=role.gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, number),
            )
            .remote(config, number, threads)
            for number in numbers
        ]
        self._ends = {actor.follow.remote(self._store.port): n for n, actor in zip(numbers, self._actors, strict=True)}

    def meet(self) -> Gang:
        """Once the leader has its model: wait for the others, and form the groups.

        Raises EngineError when one of them ended, ClusterError when one is not there within start_timeout_s.
        """
        ends_s = time.monotonic() + self._config.start_timeout_s
        names = [_ready(number) for number in self._ends.values()]
        while not self._store.check(names):
            self.check()
            if time.monotonic() > ends_s:
                raise ClusterError(
                    f"a rank was not ready within start_timeout_s={self._config.start_timeout_s:g}; raise it"
                )
            time.sleep(_READY_POLL_S)
        return _form(self._config, self._store, 0)

    def check(self) -> None:
        """Raises EngineError when a rank has ended."""
        over, _ = ray.wait(list(self._ends), num_returns=1, timeout=0)
        if over:
            raise EngineError(f"rank {self._ends[over[0]]} of the worker ended: {_reason(over[0])}")


def on_device(model: Any) -> Any:
    """The model where this process computes."""
    return model.to("cuda") if torch.cuda.is_available() else model


def _reason(end: Any) -> str:
    try:
        ray.get(end, timeout=0)
    except (FarspanError, RayError, TimeoutError) as problem:
        # The text of Ray's own error is a traceback of the other process.
        return str(getattr(problem, "cause", None) or problem).strip().splitlines()[-1].strip()
    return "it was told to"


def _ready(rank: int) -> str:
    return f"ready/{rank}"


def _store(config: ServeConfig, port: int, *, leads: bool) -> Any:
    timeout = timedelta(seconds=config.start_timeout_s)
    size = config.engine.tensor_parallel
    # Torch has it, and does not say so to mypy.
    store: Any = dist.TCPStore  # type: ignore[attr-defined]
    return store(_LOOPBACK, port, size, is_master=leads, timeout=timeout, wait_for_workers=False)


def _form(config: ServeConfig, store: Any, rank: int) -> Gang:
    """The groups of all ranks; every rank calls it at about the same time."""
    # What the machine's own name means may be an address of another interface.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    size, deadline = config.engine.tensor_parallel, timedelta(seconds=_DEADLINE_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=deadline)
    control = dist.new_group(backend="gloo", timeout=deadline)
    compute = dist.new_group(backend="nccl", timeout=deadline) if torch.cuda.is_available() else control
    assert control is not None
    assert compute is not None
    return Gang(control, compute, _DEADLINE_S)
