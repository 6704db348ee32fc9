"""Room for workers on a cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.util.placement_group import placement_group, remove_placement_group

from farspan.cluster.placement import training_bundle
from farspan.config.schema import RunConfig
from farspan.errors import ClusterError
from farspan.jobs.knock import silent
from farspan.jobs.progress import StopWish
from farspan.train.elastic import Size

_START_S, _AGAIN_S, _LOOK_S = 10.0, 4.0, 1.0
_ANSWER_S, _SLICE_S, _TOLD_S = 5.0, 5.0, 30.0


def find_room(config: RunConfig, sizes: Sequence[Size], *, again: bool) -> Size:
    """The largest of `sizes`, largest first, for which there is room; waits until there is for one of them.

    `again`: the run had workers before. Ray Train itself would wait for ever, and say nothing.

    Nothing is asked for while a node that counts as alive does not answer (see `silent_nodes`).

    Raises:
        ClusterError: none fits within resources.timeout_s.
    """
    ends = time.monotonic() + config.resources.timeout_s
    quiet: list[str] = []
    while (left_s := ends - time.monotonic()) > 0:
        if quiet := silent_nodes():
            time.sleep(min(left_s, _LOOK_S))
            continue
        for size in sizes:
            # All of them may only be on their way: a placement that waits is what makes a cluster grow. A run that was
            # under way goes on with those that are left: it grows again when the others are back.
            first_s = _START_S if not again else _AGAIN_S if _could_fit(config, size.workers) else _LOOK_S
            patience_s = left_s if len(sizes) == 1 else first_s if size == sizes[0] else _LOOK_S
            if fits(config, size.workers, min(left_s, patience_s)):
                return size
    wanted, least = worker_resources(config), sizes[-1].workers
    has = {name: ray.cluster_resources().get(name, 0) for name in wanted}
    raise ClusterError(
        f"no room for {least} workers of {wanted} within resources.timeout_s="
        f"{config.resources.timeout_s:g}; the cluster has {has} in all; ask for fewer, or add nodes{_told(quiet)}"
    )


def _told(quiet: Sequence[str]) -> str:
    if not quiet:
        return ""
    return f"; {', '.join(quiet)} did not answer in {_ANSWER_S:g} s, and nothing is placed until it counts as lost"


class EveryNodeAnswers(WorkerGroupCallback):
    """In Ray Train's controller, which has taken seconds to start: its own placement waits for every node too."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def before_worker_group_start(self, worker_group_context: object) -> None:
        ends = time.monotonic() + self._timeout_s
        while quiet := silent_nodes():
            if time.monotonic() > ends:
                raise ClusterError(f"the workers are not placed{_told(quiet)}; look at that node")
            time.sleep(_LOOK_S)


class UnreservedWorkers(FixedScalingPolicy):
    """So many workers, which nobody has to be told of: Ray Train's own tells an actor that shares a cluster among runs
    and Ray Data, and asks its autoscaler for nodes.
    """

    def after_controller_start(self, train_run_context: object) -> None:
        return

    def _maybe_send_resource_request(self) -> None:
        return


class RoomTold(WorkerGroupCallback):
    """In Ray Train's controller: tells the mailbox which placement group the workers live in."""

    def __init__(self, mailbox: ray.actor.ActorHandle) -> None:
        self._mailbox = mailbox

    def after_worker_group_start(self, worker_group: Any) -> None:
        group = worker_group.get_worker_group_state().placement_group_handle.placement_group
        # Untold, room is given back when the driver ends.
        with suppress(RayError):
            ray.get(self._mailbox.hold.remote(group), timeout=_TOLD_S)


@contextmanager
def room_given_back(mailbox: ray.actor.ActorHandle) -> Iterator[None]:
    """Where the controller dies inside, the room that it took for its workers is given back.

    Ray does it when the driver ends, too. Ray Train has a process that asks each second whether the controller lives;
    who waits for the controller is told.
    """
    try:
        yield
    except RayActorError:
        with suppress(RayError):
            for group in ray.get(mailbox.held.remote(), timeout=_TOLD_S):
                remove_placement_group(group)
        raise


def silent_nodes() -> list[str]:
    """Addresses of nodes that the cluster counts as alive and that do not answer within some seconds.

    Ray 2.60 asks a node to set a placement aside and waits for its answer without an end: if the node dies instead, the
    head places nothing any more until it is started again (ray-project/ray#64693). So nobody asks it to while a node
    may have died unseen; after a while it is counted as lost.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    doors = [(str(node["NodeManagerAddress"]), int(node["NodeManagerPort"])) for node in alive]
    return [f"{host}:{port}" for host, port in silent(doors, _ANSWER_S)]


def _could_fit(config: RunConfig, num_workers: int) -> bool:
    """Whether all nodes that are there now have as much in sum, whoever uses it."""
    there = ray.cluster_resources()
    return all(there.get(name, 0) >= num_workers * amount for name, amount in worker_resources(config).items())


class RoomWatch:
    """While a run has fewer workers than it could have: looks for room for more, then asks it to start again."""

    def __init__(self, config: RunConfig, size: Size, larger: Sequence[Size], wish: StopWish) -> None:
        self._config, self._size, self._larger, self._wish = config, size, larger, wish
        self._stop, self._begun = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="farspan-room", daemon=True)

    def __enter__(self) -> RoomWatch:
        if self._larger:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._larger:
            self._thread.join(timeout=_START_S)

    def heard(self) -> None:
        """The workers are there: what is free from now on is beside their own room."""
        self._begun.set()

    def _watch(self) -> None:
        while not self._stop.wait(self._config.parallel.grow_every_s):
            if not self._begun.is_set():
                continue
            if silent_nodes():
                continue
            for size in self._larger:
                if self._stop.is_set():
                    return
                # Beside the workers that train: their own room is theirs again after the restart.
                if fits(self._config, size.workers - self._size.workers, _LOOK_S):
                    self._wish.ask(f"there is room for {size.workers} workers")
                    return


def fits(config: RunConfig, num_workers: int, timeout_s: float) -> bool:
    """Whether so many workers find room within `timeout_s`."""
    if num_workers == 0:
        return True
    ends = time.monotonic() + timeout_s
    group = placement_group([worker_resources(config)] * num_workers)
    try:
        while (left_s := ends - time.monotonic()) > 0:
            if group.wait(timeout_seconds=min(left_s, _SLICE_S)):
                return True
            # It is taken back before it can be made on a node that died while it waited for room.
            if left_s > _SLICE_S and silent_nodes():
                return False
        return False
    finally:
        remove_placement_group(group)


def worker_resources(config: RunConfig) -> dict[str, float]:
    """What one worker asks Ray for."""
    return training_bundle(config.resources)
