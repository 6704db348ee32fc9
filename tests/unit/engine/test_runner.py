"""Decode rows are gathered in groups: bounded memory, and the logits of one group or of one row each."""

from __future__ import annotations

import random

import pytest
import torch
from tests.unit.engine.tiny import engine_config, prompts, tiny_model

from farspan.engine.engine import Engine
from farspan.engine.probe import plain_logits
from farspan.engine.runner import Piece, Runner, group_rows


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
        def _decode_rows(self, rows, rule):
            groups = super()._decode_rows(rows, rule)
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
