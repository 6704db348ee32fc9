"""The moment between two steps, in which all ranks tell each other what only some of them know. One small exchange."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from farspan.errors import FarspanError
from farspan.train.outside import Outside
from farspan.train.samples import Place, Seen, WitnessedReader, merge_seen

# A launcher's preemption notice is asked for by all ranks together, which costs it a round trip per rank.
_ASK_EVERY_S = 2.0


@dataclass(frozen=True)
class Met:
    """What every rank knows after the exchange; the same on all of them."""

    seen: dict[Place, Seen]
    """The samples of the step, in order."""
    stop: str | None
    """Why the run stops here, if it does."""


class Boundary:
    """Meets once after each step."""

    def __init__(self, outside: Outside) -> None:
        self._outside = outside
        self._asked_s = time.monotonic()

    def meet(self, reader: WitnessedReader, trouble: FarspanError | None = None) -> Met:
        """Collective. `trouble` is what went wrong behind this rank's back; every rank raises the first there is."""
        due = time.monotonic() - self._asked_s >= _ASK_EVERY_S
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, (reader.take(), trouble, self._outside.notice(), due))
        for _, problem, _, _ in told:
            if problem is not None:
                raise problem
        stop = next((notice for _, _, notice, _ in told if notice is not None), None)
        # Clocks differ between ranks; the first rank's decides for all.
        if told[0][3]:
            self._asked_s = time.monotonic()
            stop = self._outside.preempted() or stop
        return Met(merge_seen(seen for seen, _, _, _ in told), stop)
