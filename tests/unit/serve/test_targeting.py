"""A call that names its replica gets it first; one whose replica is gone, or that names none, gets any two."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

from farspan.serve.targeting import oldest_naming, ranked

NAMES = ["a", "b", "c", "d", "e"]


def test_the_named_replica_comes_first_and_two_others_stand_behind_it():
    for _ in range(50):
        first, then = ranked(NAMES, NAMES, "c")
        assert first == ["c"]
        assert len(set(then)) == 2
        assert "c" not in then


def test_without_the_named_one_two_of_all_are_asked_and_nobody_is_left_out():
    drawn = Counter[str]()
    for wanted in ("", "gone"):
        for _ in range(200):
            (then,) = ranked(NAMES, NAMES, wanted)
            assert len(set(then)) == 2
            drawn.update(then)
    assert set(drawn) == set(NAMES)


def test_one_replica_is_found_however_it_is_called():
    assert ranked(["a"], ["A"], "a") == [["A"]]
    assert ranked(["a"], ["A"], "b") == [["A"]]
    assert ranked([], [], "a") == []


def call(wanted: str, *, done: bool = False) -> SimpleNamespace:
    future = SimpleNamespace(done=lambda: done)
    return SimpleNamespace(future=future, metadata=SimpleNamespace(session_id=wanted, internal_request_id="one"))


def test_calls_of_one_http_request_each_get_the_replica_they_name():
    first, second, third = call("a"), call("b"), call("a")
    assert oldest_naming("a", [first, second, third]) is first
    assert oldest_naming("b", [first, second, third]) is second
    assert oldest_naming("a", [call("a", done=True), second, third]) is third
    assert oldest_naming("c", [first, second]) is None
