"""A call that names its replica gets it first; one whose replica is gone, or that names none, gets any two."""

from __future__ import annotations

from collections import Counter

from farspan.serve.targeting import ranked

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
