"""Decode rows are attended in groups: bounded memory, shared beginnings once, and the logits of one row each."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tests.unit.engine.tiny import engine_config, prompts, tiny_model

from farspan.engine.attention import first_visible
from farspan.engine.engine import Engine
from farspan.engine.probe import plain_logits
from farspan.engine.runner import Piece, Runner, group_rows, sharing_rows
from farspan.models.rules import LayerRule


def test_one_long_row_is_not_multiplied_by_the_short_ones():
    widths = [1] * 63 + [1000]
    assert group_rows(widths, 1000) == [range(63), range(63, 64)]
    assert group_rows([], 10) == []
    assert group_rows([50], 10) == [range(1)]


def test_every_row_is_in_exactly_one_group_and_no_group_exceeds_the_budget_but_by_one_row():
    chance = random.Random(0)
    for _ in range(300):
        widths = sorted(chance.choice([1, 2, 30, 400]) for _ in range(chance.randint(1, 20)))
        budget = chance.randint(1, 1000)
        groups = group_rows(widths, budget)
        assert [row for group in groups for row in group] == list(range(len(widths)))
        assert all(len(group) == 1 or len(group) * widths[group.stop - 1] <= budget for group in groups)


@pytest.mark.parametrize("gather_pages", [1, 6, 20, 10_000])
def test_decode_logits_of_grouped_rows_equal_plain_logits(gather_pages):
    model = tiny_model()
    engine = Engine(model, engine_config())
    pool, layout = engine.pool, engine.pool.layout
    gathered: list[int] = []

    class Watched(Runner):
        def _decode_parts(self, rows, rule, group):
            groups = super()._decode_parts(rows, rule, group)
            gathered.extend(group.tables_BN.numel() for group in groups)
            return groups

    runner = Watched(
        model, pool, engine._runner.survey, gather_bytes=-(-gather_pages * layout.page_bytes // layout.num_layers)
    )
    tokens = prompts(70, 3, 21, 9, 41, 2)
    pages = [pool.alloc(layout.num_pages(len(row))) for row in tokens]
    runner.run([Piece(row[:-1], 0, held) for row, held in zip(tokens, pages, strict=True)])
    gathered.clear()
    logits = runner.run([Piece(row[-1:], len(row) - 1, held) for row, held in zip(tokens, pages, strict=True)])
    for row, got in zip(tokens, logits, strict=True):
        assert float((got - plain_logits(model, torch.tensor(row))[-1]).abs().max()) <= 1e-8
    longest = layout.num_pages(70)
    assert max(gathered) <= max(gather_pages, longest)
    assert (len(gathered) == 1) == (gather_pages >= longest * len(tokens))


def test_rows_with_one_beginning_share_it_and_the_others_are_attended_together():
    common = list(range(10))
    family = [[*common, 20 + i, 30 + i] for i in range(4)]
    strangers = [list(range(100, 113)), [], [97, 98]]
    assert sharing_rows([*family, *strangers]) == [(range(4), 10), (range(4, 7), 0)]
    assert sharing_rows([*strangers, *family]) == [(range(3), 0), (range(3, 7), 10)]
    # Three are too few, and seven pages.
    assert sharing_rows(family[:3]) == [(range(3), 0)]
    assert sharing_rows([[*common[:7], 50 + i] for i in range(9)]) == [(range(9), 0)]
    assert sharing_rows([]) == []


def test_one_row_of_another_kind_does_not_shorten_what_the_others_share():
    common = list(range(40))
    family = [[*common, 100 + i] for i in range(5)]
    assert sharing_rows([*family, [*common[:9], 200]]) == [(range(5), 40), (range(5, 6), 0)]


def test_decode_logits_of_rows_that_share_a_beginning_equal_plain_logits():
    model = tiny_model().float()
    engine = Engine(model, engine_config(dtype="float32"))
    pool = engine.pool
    shared: list[int] = []

    class Watched(Runner):
        def _decode_rows(self, rows, seen, group, part, pages):
            shared.append(pages)
            return super()._decode_rows(rows, seen, group, part, pages)

    runner = Watched(model, pool, engine._runner.survey)
    size = pool.layout.page_tokens
    beginning, *others = prompts(9 * size, 5, 1, 2 * size, 9, 70, 4)
    tokens = [beginning + other for other in others[:4]] + others[4:]
    held = pool.alloc(9)
    pages = [
        (held if i < 4 else []) + pool.alloc(pool.layout.num_pages(len(t)) - (9 if i < 4 else 0))
        for i, t in enumerate(tokens)
    ]
    runner.run([Piece(beginning, 0, held)])
    computed = [9 * size] * 4 + [0, 0]
    runner.run([Piece(t[past:-1], past, p) for t, past, p in zip(tokens, computed, pages, strict=True) if t[past:-1]])
    logits = runner.run([Piece(t[-1:], len(t) - 1, p) for t, p in zip(tokens, pages, strict=True)])
    assert shared == [9, 0]
    for t, got in zip(tokens, logits, strict=True):
        assert float((got - plain_logits(model, torch.tensor(t))[-1]).abs().max()) <= 1e-4


@pytest.mark.parametrize("window", [None, 1, 6, 50])
@pytest.mark.parametrize("chunk", [None, 1, 8, 50])
def test_the_first_token_seen_is_the_first_that_window_and_chunk_let_through_one_by_one_and_at_once(window, chunk):
    rule = LayerRule(window=window, chunk=chunk)

    def sees(position, other):
        near = window is None or position - other < window
        return near and (chunk is None or position // chunk == other // chunk)

    positions = np.arange(40)
    expected = [next(other for other in range(40) if sees(position, other)) for position in range(40)]
    assert [first_visible(position, rule) for position in range(40)] == expected
    assert first_visible(positions, rule).tolist() == expected
    assert first_visible(positions, rule).dtype == np.int64
