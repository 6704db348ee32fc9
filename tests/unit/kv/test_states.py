"""States are never lost, never doubly owned, begin empty, and say when they changed hands."""

from __future__ import annotations

import random

import pytest
import torch

from farspan.errors import EngineError
from farspan.kv.states import StateLayout, StatePool, StateShape

LAYOUT = StateLayout(
    (
        StateShape(0, "conv", 0, (5, 3), "bfloat16"),
        StateShape(0, "recurrent", 0, (2, 3, 4), "float32"),
        StateShape(2, "conv", 1, (7,), "float64"),
    )
)


def pool_of(num_slots: int) -> StatePool:
    return StatePool(LAYOUT, num_slots, torch.device("cpu"))


def test_every_state_of_every_slot_has_a_place_of_its_own():
    pool = pool_of(4)
    views = [pool.states_S(number) for number in range(3)]
    for number, view in enumerate(views):
        for slot in range(4):
            view[slot] = 10 * number + slot
    assert [tuple(view.shape) for view in views] == [(4, 5, 3), (4, 2, 3, 4), (4, 7)]
    for number, view in enumerate(views):
        assert all(bool((view[slot] == 10 * number + slot).all()) for slot in range(4))
    assert pool.storage_SB.nbytes == 4 * LAYOUT.slot_bytes


def test_a_slot_that_changes_hands_is_empty_and_has_a_new_epoch():
    pool = pool_of(1)
    slot = pool.hold("first")
    assert pool.hold("first") == slot
    epoch = pool.epoch(slot)
    pool.states_S(1)[slot] = float("nan")
    pool.kept[slot] = "a cache"
    pool.release("first")
    pool.release("first")
    assert pool.hold("second") == slot
    assert pool.epoch(slot) == epoch + 1
    assert not pool.storage_SB.any()
    assert pool.kept[slot] is None


def test_random_owners_never_share_a_slot():
    pool, chance = pool_of(5), random.Random(2)
    alive: dict[str, int] = {}
    for number in range(500):
        if len(alive) < 5 and chance.random() < 0.6:
            alive[f"s{number}"] = pool.hold(f"s{number}")
        elif alive:
            name = chance.choice(sorted(alive))
            pool.release(name)
            del alive[name]
        pool.check_integrity(alive)
        assert len(set(alive.values())) == len(alive) == 5 - pool.num_free


def test_integrity_check_sees_a_lost_slot_one_owned_twice_and_one_of_a_sequence_that_is_over():
    lost = pool_of(3)
    lost._free.pop()
    with pytest.raises(EngineError, match="lost or doubly owned"):
        lost.check_integrity([])
    doubled = pool_of(3)
    doubled._free[0] = doubled.hold("a")
    with pytest.raises(EngineError, match="lost or doubly owned"):
        doubled.check_integrity(["a"])
    over = pool_of(3)
    over.hold("a")
    with pytest.raises(EngineError, match="sequence is over"):
        over.check_integrity(["b"])
