"""A run with fewer workers than it could have looks for room for more beside its own workers'."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from farspan.jobs import room
from farspan.jobs.progress import StopWish
from farspan.jobs.room import RoomWatch
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
    parallel, wish = _Looking(5), StopWish()
    small, large = Size(workers=1, accumulation=4), Size(workers=2, accumulation=2)
    with RoomWatch(SimpleNamespace(parallel=parallel), small, [large], wish) as watch:  # type: ignore[arg-type]
        assert parallel.looked.wait(_DEADLINE_S)
        assert (asked, wish.reason) == ([], None)
        watch.heard()
        watch._thread.join(_DEADLINE_S)
        assert (asked, wish.reason) == ([1], "there is room for 2 workers")
