"""What counts as waiting for other ranks, and for how long; by a clock of the test's own, without processes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from farspan.parallel.exchange import Transfer
from farspan.parallel.waits import Waits

CPU = torch.device("cpu")


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Arrives:
    """Something under way that is there at a time; whoever waits for it before stands still until then."""

    clock: Clock
    at_s: float

    def wait(self) -> bool:
        self.clock.now_s = max(self.clock.now_s, self.at_s)
        return True


def transfer(waits: Waits | None, clock: Clock, *arrivals_s: float) -> Transfer:
    works = [Arrives(clock, at_s) for at_s in arrivals_s]
    return Transfer(works, (torch.zeros(1),), (), waits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("computed_s", "arrivals_s", "waited_s"),
    [(0.0, (0.5,), 0.5), (0.25, (0.5,), 0.25), (0.5, (0.5,), 0.0), (2.0, (0.5, 0.75), 0.0), (0.25, (0.5, 1.5), 1.25)],
    ids=["nothing hides it", "half hidden", "just hidden", "long there", "two pieces, the later one counts"],
)
def test_of_a_transfer_counts_what_computing_did_not_hide(
    computed_s: float, arrivals_s: tuple[float, ...], waited_s: float
) -> None:
    clock = Clock()
    waits = Waits(clock)
    coming = transfer(waits, clock, *arrivals_s)
    clock.now_s += computed_s
    coming.wait()
    assert waits.seconds() == waited_s


def test_waits_add_up_until_counting_begins_again() -> None:
    clock = Clock()
    waits = Waits(clock)
    for at_s in (1.0, 3.0):
        transfer(waits, clock, at_s).wait()
    assert waits.seconds() == waits.seconds() == 3.0
    waits.begin()
    assert waits.seconds() == 0.0
    with waits.on(CPU):
        clock.now_s += 0.125
    assert waits.seconds() == 0.125


def test_a_rank_that_is_alone_counts_nothing() -> None:
    clock = Clock()
    transfer(None, clock, 1.0).wait()
    assert clock.now_s == 1.0


@pytest.mark.gpu
def test_on_a_gpu_counts_what_the_stream_waited_and_not_what_it_computed() -> None:
    cuda, cycles = torch.device("cuda"), 100_000_000
    other = torch.cuda.Stream()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    # What a first sleep loads takes as long as a sleep, and the stream that waits does not wait for it.
    torch.cuda._sleep(1)
    for computed, share in ((0, 1.0), (2 * cycles, 0.0)):
        waits = Waits()
        torch.cuda.synchronize()
        with torch.cuda.stream(other):
            marks[0].record()
            torch.cuda._sleep(cycles)
            marks[1].record()
        if computed:
            torch.cuda._sleep(computed)
        with waits.on(cuda):
            torch.cuda.current_stream().wait_event(marks[1])
        waited_s = waits.seconds()
        taken_s = marks[0].elapsed_time(marks[1]) / 1e3
        # A launch or two may lie between the marks and the wait; the sleep is a thousand times as long.
        assert abs(waited_s - share * taken_s) < 0.1 * taken_s
