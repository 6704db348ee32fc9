"""Layers that see the same tokens share page tables, and a page is gone exactly when nobody will read it again."""

from __future__ import annotations

import random

import pytest
import torch

from farspan.engine.attention import first_visible
from farspan.kv.grouping import EVERYTHING, PageGroup, Reach, group_layers, widest
from farspan.kv.layout import GONE, KvLayout, LayerShape
from farspan.kv.pages import PagePool
from farspan.models.rules import LayerRule

WINDOW = Reach(window=1024)


def mixed(num_layers: int, every: int) -> list[Reach]:
    """One layer in `every` sees everything."""
    return [EVERYTHING if number % every == every - 1 else WINDOW for number in range(num_layers)]


@pytest.mark.parametrize(
    ("reaches", "most_groups"),
    [(mixed(36, 2), 2), (mixed(34, 6), 8), (mixed(62, 6), 18), ([WINDOW] * 32, 1), ([EVERYTHING] * 80, 1)],
    ids=["gpt-oss", "gemma 3 4b", "gemma 3 27b", "mistral", "llama"],
)
def test_every_layer_is_in_one_group_of_its_reach_and_little_of_a_page_is_empty(reaches, most_groups):
    groups = group_layers([512] * len(reaches), reaches)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(reaches)))
    assert all(reaches[layer] == group.reach for group in groups for layer in group.layers)
    assert len(groups) <= most_groups
    largest = max(len(group.layers) for group in groups)
    assert len(groups) * largest <= 1.05 * len(reaches)
    full = sum(reach == EVERYTHING for reach in reaches)
    assert sum(group.reach == EVERYTHING for group in groups) * largest == full, "of a long sequence nothing is empty"


def test_layers_of_several_sizes_fit_into_pages_of_one_size():
    sizes = [64, 512, 64, 512, 64, 64]
    groups = group_layers(sizes, [WINDOW, EVERYTHING] * 2 + [WINDOW] * 2)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(6))
    layout = KvLayout("m", tuple(LayerShape(1, size // 2, size // 2) for size in sizes), "float64", 4, grouped=groups)
    pool = PagePool(layout, 5 * layout.page_bytes)
    for layer in range(6):
        pool.keys_PSGD(layer)[2] = layer + 1.0
        pool.values_PSGC(layer)[2] = -layer - 1.0
    # Layers of one group have places of their own; pages of other groups are other pages.
    for group in groups:
        pool.storage_PB[2] = 0
        for layer in group.layers:
            pool.keys_PSGD(layer)[2], pool.values_PSGC(layer)[2] = layer + 1.0, -layer - 1.0
        for layer in group.layers:
            assert bool((pool.keys_PSGD(layer)[2] == layer + 1.0).all())
            assert bool((pool.values_PSGC(layer)[2] == -layer - 1.0).all())
    assert not torch.cat([pool.storage_PB[:2], pool.storage_PB[3:]]).any()


def test_a_store_that_several_layers_read_keeps_what_the_farthest_seeing_one_needs():
    assert widest([Reach(window=8), Reach(window=30)]) == Reach(window=30)
    assert widest([Reach(window=8), EVERYTHING]) == EVERYTHING
    assert widest([Reach(chunk=8), Reach(chunk=8)]) == Reach(chunk=8)
    assert widest([Reach(chunk=8), Reach(window=8)]) == EVERYTHING


@pytest.mark.parametrize("seed", range(40))
def test_a_page_but_the_last_is_gone_exactly_when_no_later_token_sees_any_of_it(seed):
    chance = random.Random(seed)
    size = chance.choice([1, 3, 4])
    limits = [chance.choice([{}, {"window": chance.randint(1, 20)}, {"chunk": chance.randint(1, 20)}]) for _ in "123"]
    shape = LayerShape(1, 1, 1)
    grouped = tuple(PageGroup((number,), Reach(**limit)) for number, limit in enumerate(limits))
    layout = KvLayout("m", (shape,) * 3, "float64", size, grouped=grouped)
    for num_tokens in range(60):
        table = list(range(layout.num_pages(num_tokens)))
        held = layout.without_gone(table, num_tokens)
        for place in range(layout.num_places(num_tokens)):
            for group, limit in enumerate(limits):
                rule = LayerRule(**limit)
                seen = min(first_visible(later, rule) for later in range(num_tokens, num_tokens + 25))
                last = place == layout.num_places(num_tokens) - 1
                gone = held[place * 3 + group] == GONE
                assert gone == ((place + 1) * size <= seen and not last), (num_tokens, place, limit)
        assert layout.num_gone(num_tokens) == held.count(GONE)
        assert layout.num_travelling(num_tokens) == len(held) - held.count(GONE)


@pytest.mark.parametrize("seed", range(40))
def test_however_a_prompt_is_cut_it_never_holds_more_pages_at_a_time_than_was_said(seed):
    chance = random.Random(seed)
    limit = chance.choice([{"window": chance.randint(1, 40)}, {"chunk": chance.randint(1, 40)}])
    layout = KvLayout(
        "m",
        (LayerShape(1, 1, 1),) * 2,
        "float64",
        chance.choice([1, 4, 7]),
        grouped=(PageGroup((0,)), PageGroup((1,), Reach(**limit))),
    )
    for step in (1, 5, 32):
        done = most = 0
        total = chance.randint(1, 200)
        while done < total:
            new = min(chance.randint(1, step), total - done)
            most = max(most, layout.num_pages(done + new) - layout.num_gone(done))
            done += new
        assert most <= layout.most_pages(total, step) <= layout.num_pages(total)
        held = layout.most_pages(total, step)
        room = layout.room_tokens(held, step, 10_000)
        assert total <= room
        assert layout.most_pages(room, step) <= held
        assert room == 10_000 or layout.most_pages(room + 1, step) > held
