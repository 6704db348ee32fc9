"""Pages are never lost, never doubly owned, and say when they changed hands."""

from __future__ import annotations

import random

import pytest
import torch

from farspan.errors import EngineError
from farspan.kv.layout import KvLayout, LayerShape
from farspan.kv.ownership import Forgotten, Owned, told
from farspan.kv.pages import PagePool
from farspan.kv.ticket import LeaseTable, SourceAddress

LAYOUT = KvLayout.uniform(
    model="m", num_layers=3, num_kv_heads=2, k_head_dim=6, v_head_dim=4, dtype="float64", page_tokens=5
)
MIXED = KvLayout("m", (LayerShape(2, 6, 4), LayerShape(1, 3, 3), LayerShape(4, 2, 8)), "float64", page_tokens=5)
NOWHERE = SourceAddress("memory", "nobody", b"", 0, 0, 8)


def test_the_pool_never_exceeds_its_bytes_and_holds_at_least_one_page():
    assert LAYOUT.page_bytes == 3 * 5 * 2 * (6 + 4) * 8
    pool = PagePool(LAYOUT, 7 * LAYOUT.page_bytes + 100)
    assert pool.num_pages == 7
    assert pool.storage_PB.nbytes <= 7 * LAYOUT.page_bytes + 100
    with pytest.raises(EngineError, match="at least one page"):
        PagePool(LAYOUT, LAYOUT.page_bytes - 1)


@pytest.mark.parametrize("layout", [LAYOUT, MIXED], ids=["layers alike", "layers that differ"])
def test_every_slot_of_every_layer_has_a_place_of_its_own_inside_its_page(layout):
    pool = PagePool(layout, 3 * layout.page_bytes)
    number = 0
    for layer in range(layout.num_layers):
        for view in (pool.keys_PSGD(layer), pool.values_PSGC(layer)):
            view.copy_(torch.arange(number, number + view.numel(), dtype=torch.float64).view(view.shape))
            number += view.numel()
    written = pool.storage_PB.view(-1).view(torch.float64)
    assert written.sort().values.tolist() == list(range(number))
    page_1 = pool.storage_PB[1].view(torch.float64)
    assert set(pool.keys_PSGD(2)[1].flatten().tolist()) <= set(page_1.tolist())


def test_a_reallocated_page_has_a_new_epoch_and_nothing_of_its_former_owner():
    pool = PagePool(LAYOUT, 2 * LAYOUT.page_bytes)
    first = pool.alloc(2)
    assert first is not None
    epochs = [pool.epoch(page) for page in first]
    pool.keys_PSGD(1)[first] = float("nan")
    pool.free(first)
    again = pool.alloc(2)
    assert again is not None
    assert sorted(again) == sorted(first)
    assert all(pool.epoch(page) == epoch + 1 for page, epoch in zip(first, epochs, strict=True))
    assert not pool.storage_PB.any()


def test_allocation_is_all_or_nothing():
    pool = PagePool(LAYOUT, 4 * LAYOUT.page_bytes)
    assert pool.alloc(5) is None
    assert pool.num_free == 4
    assert pool.epochs_P.tolist() == [0, 0, 0, 0]


def test_random_holders_and_quarantines_keep_every_page_in_exactly_one_state():
    pool = PagePool(LAYOUT, 23 * LAYOUT.page_bytes)
    chance = random.Random(3)
    held: list[list[int]] = []
    quarantined: list[list[int]] = []
    for _ in range(2000):
        action = chance.choice(["alloc", "retain", "free", "quarantine", "release"])
        if action == "alloc" and (pages := pool.alloc(chance.randint(0, 6))) is not None:
            held.append(pages)
        elif action == "retain" and held:
            pages = chance.choice(held)
            pool.retain(pages)
            held.append(pages)
        elif action == "free" and held:
            pool.free(held.pop(chance.randrange(len(held))))
        elif action == "quarantine" and held and held.count(held[-1]) == 1:
            quarantined.append(held.pop())
            pool.quarantine(quarantined[-1])
        elif action == "release" and quarantined:
            pool.release_quarantine(quarantined.pop(0))
        pool.check_integrity()
        assert pool.num_free + pool.num_held + pool.num_quarantined == pool.num_pages
        assert pool.num_held == len({page for pages in held for page in pages})
        assert pool.num_quarantined == sum(map(len, quarantined))


def test_integrity_check_sees_a_page_that_is_lost_and_one_that_is_owned_twice():
    lost = PagePool(LAYOUT, 4 * LAYOUT.page_bytes)
    lost._free.pop()
    with pytest.raises(EngineError, match="lost or doubly owned"):
        lost.check_integrity()
    doubled = PagePool(LAYOUT, 4 * LAYOUT.page_bytes)
    doubled._holders[2] = 1
    with pytest.raises(EngineError, match="lost or doubly owned"):
        doubled.check_integrity()


def test_a_lease_gives_its_pages_back_once_by_release_or_by_time():
    pool = PagePool(LAYOUT, 8 * LAYOUT.page_bytes)
    leases = LeaseTable(pool, lease_s=10.0)
    tickets = [leases.offer(f"r{i}", pool.alloc(2) or [], 9, NOWHERE, now_s=100.0 + i) for i in range(3)]
    assert leases.release(tickets[0].ticket_id)
    assert not leases.release(tickets[0].ticket_id)
    assert not leases.release("unknown")
    assert leases.expire(now_s=111.0) == [tickets[1].ticket_id]
    assert not leases.release(tickets[1].ticket_id)
    assert (pool.num_held, leases.num_open) == (2, 1)
    assert leases.release(tickets[2].ticket_id)
    assert pool.num_free == 8
    pool.check_integrity()


def test_layouts_that_differ_in_anything_have_different_fingerprints():
    from dataclasses import replace

    others = [
        replace(LAYOUT, model="n"),
        replace(LAYOUT, layers=LAYOUT.layers * 2),
        replace(LAYOUT, dtype="float32"),
        replace(LAYOUT, page_tokens=6),
        replace(LAYOUT, layers=(*LAYOUT.layers[:2], LayerShape(2, 4, 6))),
        replace(LAYOUT, num_ranks=2),
    ]
    assert len({layout.fingerprint() for layout in [LAYOUT, *others]}) == 7
    assert replace(LAYOUT).fingerprint() == LAYOUT.fingerprint()


def test_a_pool_that_mirrors_another_has_its_content_after_any_history():
    decider, mirror = (PagePool(LAYOUT, 12 * LAYOUT.page_bytes) for _ in range(2))
    assert decider.take_changes() == []
    chooser, held = random.Random(3), []

    def compute() -> None:
        """Both write the same into pages that are held, as ranks do after each message."""
        mirror.mirror(decider.take_changes())
        for page in {page for pages in held for page in pages}:
            content = torch.randint(1, 256, (LAYOUT.page_bytes,), dtype=torch.uint8)
            decider.storage_PB[page], mirror.storage_PB[page] = content, content
        assert torch.equal(decider.storage_PB, mirror.storage_PB)

    for _ in range(300):
        action = chooser.choice(["alloc", "alloc", "free", "copy", "compute"])
        if action == "alloc" and (pages := decider.alloc(chooser.randint(1, 3))) is not None:
            held.append(pages)
        elif action == "free" and held:
            decider.free(held.pop(chooser.randrange(len(held))))
        elif action == "copy" and len(held) > 1:
            source, target = chooser.sample(held, 2)
            decider.copy(source[0], target[0])
        elif action == "compute":
            compute()
    compute()
    assert decider.storage_PB.any()


def test_whoever_holds_a_page_and_is_not_known_is_told_with_the_page_its_epoch_and_who_took_it_last():
    pool = PagePool(LAYOUT, 8 * LAYOUT.page_bytes)
    mine, ours, lost = (pool.alloc(2, owner) or [] for owner in ("one", "two", "three"))
    pool.retain(ours, "four")
    known = [Owned("one", mine), Owned("two", ours), Owned("four", ours), Owned("three", lost)]
    assert pool.forgotten(known) == []
    pool.quarantine(lost)
    assert pool.forgotten(known) == []
    held = [(pool.epoch(page), page) for page in range(pool.num_pages)]
    for gone, taker in ((0, "one"), (1, "four"), (2, "four"), (3, "three")):
        pages = sorted(known[gone].pages)
        found = pool.forgotten(known[:gone] + known[gone + 1 :])
        assert [(f.epoch, f.page, f.taker) for f in found] == [(*held[page], taker) for page in pages]
    assert "page 0 (epoch 0, last taken by an owner without a name)" in told([Forgotten(0, 0, "")])
    assert told([Forgotten(page, 1, "r") for page in range(9)]).endswith("and 6 more")


def test_a_page_that_somebody_owns_without_holding_it_is_an_error():
    pool = PagePool(LAYOUT, 8 * LAYOUT.page_bytes)
    pages = pool.alloc(3, "one") or []
    with pytest.raises(EngineError, match=rf"KV page {pages[1]} \(epoch 1\) has 1 holders, and .* by one and two"):
        pool.forgotten([Owned("one", pages), Owned("two", pages[1:2])])
    pool.free(pages)
    with pytest.raises(EngineError, match="has 0 holders, and is owned by one"):
        pool.forgotten([Owned("one", pages)])
