"""A run with fewer workers than it could have looks for room for more beside its own workers'."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError

from farspan.errors import ClusterError
from farspan.jobs import room
from farspan.jobs.progress import StopWish
from farspan.jobs.room import EveryNodeAnswers, RoomWatch, find_room, fits, room_given_back
from farspan.train.elastic import Size

_DEADLINE_S = 30.0


class _Looking:
    """`config.parallel`, which is asked for `grow_every_s` before each look."""

    def __init__(self, enough: int) -> None:
        self._left, self.looked = enough, threading.Event()

    @property
    def grow_every_s(self) -> float:
        self._left -= 1
        if self._left == 0:
            self.looked.set()
        return 0.001


def test_room_that_the_runs_own_workers_are_about_to_take_is_not_room_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def fits(config: object, num_workers: int, timeout_s: float) -> bool:
        asked.append(num_workers)
        return True

    monkeypatch.setattr(room, "fits", fits)
    monkeypatch.setattr(room, "silent_nodes", lambda: [])
    parallel, wish = _Looking(5), StopWish()
    small, large = Size(workers=1, accumulation=4), Size(workers=2, accumulation=2)
    with RoomWatch(SimpleNamespace(parallel=parallel), small, [large], wish) as watch:  # type: ignore[arg-type]
        assert parallel.looked.wait(_DEADLINE_S)
        assert (asked, wish.reason) == ([], None)
        watch.heard()
        watch._thread.join(_DEADLINE_S)
        assert (asked, wish.reason) == ([1], "there is room for 2 workers")


@pytest.fixture
def small_cluster(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A config for one worker of one CPU, and no waiting between two looks."""
    monkeypatch.setattr(room, "_LOOK_S", 0.001)
    monkeypatch.setattr(room, "worker_resources", lambda config: {"CPU": 1.0})
    monkeypatch.setattr(room.ray, "cluster_resources", lambda: {"CPU": 4.0})
    return SimpleNamespace(resources=SimpleNamespace(timeout_s=30.0))


def test_nothing_is_placed_before_every_node_that_counts_as_alive_has_answered(
    monkeypatch: pytest.MonkeyPatch, small_cluster: SimpleNamespace
) -> None:
    told: list[str] = []
    answers = [["10.0.0.2:1234"], ["10.0.0.2:1234"], []]

    def silent_nodes() -> list[str]:
        told.append("asked")
        return answers.pop(0)

    def fits(config: object, num_workers: int, timeout_s: float) -> bool:
        told.append("placed")
        return True

    monkeypatch.setattr(room, "silent_nodes", silent_nodes)
    monkeypatch.setattr(room, "fits", fits)
    size = Size(workers=1, accumulation=1)
    assert find_room(small_cluster, [size], again=True) == size  # type: ignore[arg-type]
    assert told == ["asked", "asked", "asked", "placed"]


def test_a_node_that_never_answers_is_named_when_the_time_is_up(
    monkeypatch: pytest.MonkeyPatch, small_cluster: SimpleNamespace
) -> None:
    monkeypatch.setattr(room, "silent_nodes", lambda: ["10.0.0.2:1234"])
    monkeypatch.setattr(room, "fits", lambda *asked: pytest.fail("placed beside a node that does not answer"))
    small_cluster.resources.timeout_s = 0.05
    with pytest.raises(
        ClusterError, match=r"timeout_s=0.05; the cluster has .* in all; .*; 10.0.0.2:1234 did not answer"
    ):
        find_room(small_cluster, [Size(workers=1, accumulation=1)], again=True)  # type: ignore[arg-type]


def test_a_placement_that_waits_for_room_is_taken_back_when_a_node_falls_silent(
    monkeypatch: pytest.MonkeyPatch, small_cluster: SimpleNamespace
) -> None:
    told: list[str] = []

    class Waiting:
        def wait(self, timeout_seconds: float) -> bool:
            told.append("waits")
            return False

    def silent_nodes() -> list[str]:
        told.append("asked")
        return ["10.0.0.2:1234"] if told.count("asked") == 2 else []

    monkeypatch.setattr(room, "placement_group", lambda bundles: Waiting())
    monkeypatch.setattr(room, "remove_placement_group", lambda group: told.append("taken back"))
    monkeypatch.setattr(room, "silent_nodes", silent_nodes)
    assert not fits(small_cluster, 1, 60.0)  # type: ignore[arg-type]
    assert told == ["waits", "asked", "waits", "asked", "taken back"]


def test_the_controllers_own_placement_waits_for_every_node(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [["10.0.0.2:1234"], []]
    monkeypatch.setattr(room, "_LOOK_S", 0.001)
    monkeypatch.setattr(room, "silent_nodes", lambda: answers.pop(0))
    EveryNodeAnswers(30.0).before_worker_group_start(None)
    assert answers == []
    monkeypatch.setattr(room, "silent_nodes", lambda: ["10.0.0.2:1234"])
    with pytest.raises(ClusterError, match=r"not placed; 10.0.0.2:1234 did not answer"):
        EveryNodeAnswers(0.0).before_worker_group_start(None)


def test_room_is_given_back_by_the_driver_only_where_the_controller_died(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    mailbox = SimpleNamespace(held=SimpleNamespace(remote=lambda: ["the workers' room"]))
    monkeypatch.setattr(room.ray, "get", lambda asked, timeout: asked)
    monkeypatch.setattr(room, "remove_placement_group", told.append)
    with room_given_back(mailbox):
        pass
    with pytest.raises(ValueError, match="of a worker"), room_given_back(mailbox):
        raise ValueError("of a worker")
    assert told == []
    with pytest.raises(RayActorError), room_given_back(mailbox):
        raise RayActorError
    assert told == ["the workers' room"]
