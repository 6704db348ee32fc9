"""Pages are found by what they hold, only by whoever may, and only as long as they hold it."""

from __future__ import annotations

import random

import pytest
import torch

from farspan.kv.grouping import PageGroup, Reach
from farspan.kv.layout import GONE, KvLayout, LayerShape
from farspan.kv.offload import PageOffload
from farspan.kv.pages import PagePool
from farspan.kv.prefix import OPEN_SCOPE, PrefixCache, PrefixScope
from farspan.memory.host import DramTier

LAYOUT = KvLayout("m", (LayerShape(1, 1, 1),), "float64", page_tokens=4)
WINDOW = Reach(window=7)
WINDOWED = KvLayout("m", LAYOUT.layers, "float64", 4, grouped=(PageGroup((0,), WINDOW),))
MIXED = KvLayout("m", LAYOUT.layers * 2, "float64", 4, grouped=(PageGroup((0,), WINDOW), PageGroup((1,))))


def test_names_depend_on_every_token_before_the_page_on_the_scope_and_on_the_model():
    other_model = KvLayout("n", LAYOUT.layers, "float64", 4)
    names = set()
    cases = 0
    for layout in (LAYOUT, other_model):
        cache = PrefixCache(PagePool(layout, 4 * layout.page_bytes))
        for scope in (OPEN_SCOPE, PrefixScope(adapter="a"), PrefixScope(salt="a"), PrefixScope(positions="a")):
            for tokens in ([1, 2, 3, 4, 5, 6, 7, 8], [0, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 9]):
                chain = cache.chain(scope)
                assert chain.name(1, tokens[:7]) is None
                name = chain.name(1, tokens)
                assert name is not None
                names.add(name)
                cases += 1
    assert len(names) == cases == 24


def test_random_sequences_find_exactly_what_the_pages_hold_and_the_index_stays_as_small_as_the_pool():
    pool = PagePool(LAYOUT, 20 * LAYOUT.page_bytes)
    cache = PrefixCache(pool)
    slots_PS = pool.keys_PSGD(0)[:, :, 0, 0]
    chance = random.Random(5)
    found = 0
    for _ in range(3000):
        tokens = [chance.randrange(2) for _ in range(chance.randint(1, 30))]
        chain = cache.chain(OPEN_SCOPE)
        match = cache.match(chain, tokens, len(tokens))
        assert match.num_tokens <= len(tokens)
        held = [*match.pages, *match.sources]
        content = slots_PS[held].flatten()[: match.num_tokens].tolist()
        assert content == [float(token) for token in tokens[: match.num_tokens]]
        found += match.num_tokens
        pool.retain(match.pages)
        new = pool.alloc(pool.layout.num_pages(len(tokens)) - len(match.pages))
        assert new is not None
        pages = [*match.pages, *new]
        filled = torch.zeros(len(pages) * 4, dtype=torch.float64)
        filled[: len(tokens)] = torch.tensor(tokens, dtype=torch.float64)
        slots_PS[pages] = filled.view(-1, 4)
        chain.num_remembered = len(match.pages)
        cache.remember(chain, [*tokens, 1, 0, 1], len(tokens), pages, tail=chance.random() < 0.5)
        pool.free(pages)
        pool.check_integrity()
        assert len(cache._entries) <= pool.num_pages
        assert len(cache._named) + len(cache._following) <= 2 * pool.num_pages
    assert found > 5_000
    assert pool.num_idle > 10


@pytest.mark.parametrize("layout", [WINDOWED, MIXED], ids=["windows", "windows and full"])
def test_sequences_that_give_pages_back_find_for_every_group_what_the_next_token_reads(layout):
    pool = PagePool(layout, 24 * layout.num_groups * layout.page_bytes)
    cache = PrefixCache(pool)
    chance = random.Random(5)
    trunks = [[chance.randrange(2) for _ in range(40)] for _ in range(6)]
    found = partly = 0
    for _ in range(1500):
        trunk = chance.choice(trunks)[: chance.randint(0, 40)]
        tokens = [*trunk, *(chance.randrange(2) for _ in range(chance.randint(1, 20)))]
        chain = cache.chain(OPEN_SCOPE)
        match = cache.match(chain, tokens, len(tokens))
        whole = len(match.pages) // layout.num_groups * 4
        for number, group in enumerate(layout.groups):
            slots_PS = pool.keys_PSGD(number)[:, :, 0, 0]
            pages = [*match.pages, *match.sources][number :: layout.num_groups]
            for position in range(group.reach.first(whole), match.num_tokens):
                assert float(slots_PS[pages[position // 4], position % 4]) == float(tokens[position])
        found += match.num_tokens
        partly += GONE in match.pages
        pool.retain(match.held)
        new = pool.alloc(layout.num_pages(len(tokens)) - len(match.pages))
        assert new is not None
        pages = [*match.pages, *new]
        for number in range(layout.num_groups):
            slots_PS = pool.keys_PSGD(number)[:, :, 0, 0]
            for position in range(whole, len(tokens)):
                page = pages[position // 4 * layout.num_groups + number]
                slots_PS[page, position % 4] = float(tokens[position])
        chain.num_remembered = whole // 4
        cache.remember(chain, [*tokens, 1, 0, 1], len(tokens), pages, tail=chance.random() < 0.5)
        # What is behind the window goes first, as while a sequence goes on.
        kept = layout.without_gone(pages, len(tokens))
        pool.free([page for page, left in zip(pages, kept, strict=True) if left == GONE != page])
        pool.free([page for page in kept if page != GONE])
        pool.check_integrity()
        assert len(cache._entries) <= pool.num_pages
        assert len(cache._named) + len(cache._following) <= 2 * pool.num_pages
    assert found > 5_000
    assert partly > 100


def test_a_quarantined_page_is_found_by_nobody():
    pool = PagePool(LAYOUT, 4 * LAYOUT.page_bytes)
    cache = PrefixCache(pool)
    pages = pool.alloc(2)
    assert pages is not None
    tokens = list(range(8))
    cache.remember(cache.chain(OPEN_SCOPE), tokens, 8, pages, tail=False)
    assert cache.match(cache.chain(OPEN_SCOPE), tokens, 8).num_tokens == 8
    pool.quarantine(pages[1:])
    assert cache.match(cache.chain(OPEN_SCOPE), tokens, 8).num_tokens == 4
    pool.release_quarantine(pages[1:])
    assert cache.match(cache.chain(OPEN_SCOPE), tokens, 8).num_tokens == 4
    pool.check_integrity()


def test_offloaded_pages_come_back_bit_by_bit_and_the_room_is_given_up():
    pool = PagePool(LAYOUT, 8 * LAYOUT.page_bytes)
    tier = DramTier(3 * 4096)
    offload = PageOffload(pool, tier)
    assert offload.room_pages == 3
    pages = pool.alloc(3)
    assert pages is not None
    pool.storage_PB[pages] = torch.randint(0, 256, (3, LAYOUT.page_bytes), dtype=torch.uint8)
    before = pool.storage_PB[pages].clone()
    kept = offload.put(pages)
    pool.free(pages)
    back = pool.alloc(3)
    assert back is not None
    assert not pool.storage_PB[back].any()
    offload.take(kept, back)
    assert torch.equal(pool.storage_PB[back], before)
    assert tier.stats().used_bytes == 0
    offload.close()
