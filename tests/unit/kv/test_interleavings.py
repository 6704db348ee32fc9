"""Whatever happens to transfers, in whatever order: no page is lost, none has two owners, no foreign byte is given."""

from __future__ import annotations

import itertools

import pytest
from tests.unit.kv.interleavings import Scale, World, explore, wander

from farspan.errors import EngineError
from farspan.kv.pull import Part, Pull
from farspan.kv.puller import Puller
from farspan.kv.transfer import Event, State

BAD = ("lose", "crash", "late", "expire", "again", "cancel", "break", "flip")
ONE = Scale(parts=((1, 1),), source_pages=2, receiver_pages=3)
SEEN = ("given", "cancelled", "re-used", "other bytes", "broke", "no answer", "no room")


class Careless(Puller):
    """Frees the pages of a transfer that may still write."""

    def _drop(self, pull: Pull | None, reason: str) -> None:
        super()._drop(pull, reason)
        for part in self._quarantined:
            self._pool.release_quarantine(part.pages)
        self._quarantined.clear()


class Trusting(Puller):
    """Believes whatever arrives."""

    def _find_foreign(self, part: Part) -> str:
        return ""


class Hasty(Puller):
    """Takes pages whose bytes were asked for, and not yet there."""

    def _advance_data(self, pull: Pull, part: Part) -> None:
        if part.transfer.state is State.PULLING:
            part.transfer = part.transfer.after(Event.LANDED).after(Event.VERIFIED)


class Forgetful(Puller):
    """Keeps a transfer whose ticket never comes."""

    def poll(self, now_s: float) -> list:
        for pull in self._pulls:
            pull.until_s = float("inf")
        return super().poll(now_s)


def one_transfer(mischief: tuple[str, ...]) -> tuple[int, int]:
    return explore(Scale(parts=((1, 1),), source_pages=2, receiver_pages=3, mischief=mischief))


def two_transfers(mischief: tuple[str, ...]) -> tuple[int, int]:
    return explore(Scale(parts=((1, 1), (1, 1)), source_pages=4, receiver_pages=4, mischief=mischief))


def test_every_order_of_any_two_bad_things_that_can_happen_to_a_transfer_in_two_parts_is_safe():
    for pair in itertools.combinations(BAD, 2):
        num_worlds, num_events = one_transfer(pair)
        assert num_events > num_worlds > 30, pair


def test_every_order_in_which_a_page_that_was_given_up_goes_to_somebody_else_is_safe():
    for bad in ("late", "cancel"):
        assert one_transfer((bad, "claim"))[0] > 50


def test_every_order_of_two_transfers_beside_each_other_is_safe():
    assert two_transfers(())[0] > 100


@pytest.mark.soak
@pytest.mark.parametrize("bad", BAD)
def test_every_order_of_a_bad_thing_beside_two_transfers_is_safe(bad):
    assert two_transfers((bad,))[0] > 200


@pytest.mark.soak
@pytest.mark.parametrize("bad", list(itertools.combinations((*BAD, "claim"), 3)), ids="-".join)
def test_every_order_of_any_three_bad_things_that_can_happen_to_a_transfer_is_safe(bad):
    assert one_transfer(bad)[0] > 50


@pytest.mark.soak
@pytest.mark.parametrize("bad", list(itertools.combinations(BAD, 2)), ids="-".join)
def test_every_order_of_any_two_bad_things_that_can_happen_to_two_transfers_is_safe(bad):
    assert two_transfers(bad)[0] > 200


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (Careless, "a read that may still land"),
        (Trusting, "foreign bytes"),
        (Hasty, "released while it may still write|foreign bytes|may still land"),
        (Forgetful, "lost pages"),
    ],
)
def test_a_receiver_that_breaks_one_rule_is_found_out(wrong, told):
    with pytest.raises((AssertionError, EngineError), match=told):
        explore(ONE, wrong)


def test_ten_thousand_events_among_six_transfers_lose_nothing_and_give_nothing_foreign():
    scale = Scale(parts=((2, 1), (1, 1, 2), (3,), (1, 4), (2, 2), (1, 1)), source_pages=14, receiver_pages=16, rare=3)
    counts = wander(scale, 10_000, seed=7)
    assert sum(counts.values()) > 9_000
    assert all(counts.get(kind, 0) > 50 for kind in (*scale.mischief, "compute", "land", "unclaim")), counts


def test_the_played_world_can_go_well_and_in_every_bad_way():
    endings: set[str] = set()

    class Watched(World):
        def check(self) -> None:
            super().check()
            for end in self.done.values():
                endings.update({"given"} if not isinstance(end, str) else {what for what in SEEN if what in end})

    draws = Scale(parts=((2, 1), (1, 1, 2), (3,)), source_pages=7, receiver_pages=8, rare=2)
    for seed in range(40):
        wander(draws, 200, seed, Watched)
    assert endings == set(SEEN)
