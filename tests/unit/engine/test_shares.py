"""Prompts that begin alike are answered by one engine; no line is lost, and all engines have about as much to do."""

from __future__ import annotations

import heapq
import random

import pytest

from farspan.engine.offline import in_groups
from farspan.engine.prompts import Prompt
from farspan.engine.request import SamplingParams
from farspan.engine.shares import share_out


def prompts_of(texts: list[list[int]], num_answered: int = 4, adapter: str = "") -> list[Prompt]:
    params = SamplingParams(max_tokens=num_answered)
    return [Prompt(f"p{n}", n, tuple(tokens), params, adapter) for n, tokens in enumerate(texts)]


def num_computed(prompts: list[Prompt]) -> int:
    """Every beginning once, by the definition; and every answer."""
    starts = {(p.adapter, p.tokens[:length]) for p in prompts for length in range(1, len(p.tokens) + 1)}
    return len(starts) + sum(p.params.max_tokens for p in prompts)


def documents(num_documents: int, num_questions: int, length: int = 60) -> list[list[int]]:
    chance = random.Random(num_documents)
    texts = []
    for _ in range(num_documents):
        document = [chance.randrange(1000) for _ in range(length)]
        texts += [[*document, *(chance.randrange(1000) for _ in range(5))] for _ in range(num_questions)]
    chance.shuffle(texts)
    return texts


def busy(shares: list[list[Prompt]], num_engines: int) -> int:
    """Tokens of the engine with most, when each takes the next share as soon as it is free."""
    engines = [0] * num_engines
    for share in shares:
        heapq.heapreplace(engines, engines[0] + num_computed(share))
    return max(engines)


@pytest.mark.parametrize("seed", range(40))
def test_every_prompt_is_in_one_share_and_only_a_group_beyond_a_fair_part_is_in_several(seed):
    chance = random.Random(seed)
    texts = [[chance.randrange(3) for _ in range(chance.randint(1, 9))] for _ in range(chance.randint(1, 60))]
    prompts = prompts_of(texts, num_answered=chance.randint(1, 5))
    prompts = [Prompt(p.id, p.line, p.tokens, p.params, chance.choice(["", "law"])) for p in prompts]
    num_engines = chance.randint(1, 8)
    groups = in_groups(prompts)
    shares = share_out(groups, num_engines)
    assert sorted(p.line for share in shares for p in share) == list(range(len(prompts)))
    assert all(shares)
    fair = -(-sum(num_computed(group) for group in groups) // num_engines)
    where = {p.line: number for number, share in enumerate(shares) for p in share}
    for group in groups:
        parts = {where[p.line] for p in group}
        assert len(parts) == 1 or num_computed(group) > fair
    start = max(min(len(p.tokens) for p in group) for group in groups)
    assert max(num_computed(share) for share in shares) <= fair + start + max(num_computed([p]) for p in prompts)


@pytest.mark.parametrize("num_engines", [2, 3, 8])
def test_documents_with_many_questions_are_computed_once_each_by_all_engines_together(num_engines):
    prompts = prompts_of(documents(40, 50))
    groups = in_groups(prompts)
    shares = share_out(groups, num_engines)
    assert sum(num_computed(share) for share in shares) == num_computed(prompts)
    assert busy(shares, num_engines) <= 1.15 * num_computed(prompts) / num_engines
    # In the order of the groups, 64 at a time, as they were given out before, most documents are computed twice.
    ordered = [p for group in groups for p in group]
    cut = [ordered[begin : begin + 64] for begin in range(0, len(ordered), 64)]
    assert sum(num_computed(share) for share in cut) >= num_computed(prompts) + 25 * 60


def test_a_group_of_everything_is_cut_into_as_many_pieces_as_there_are_engines_between_documents():
    chance = random.Random(0)
    start = [chance.randrange(1000) for _ in range(500)]
    # One beginning for all saves more than a document for each: they are one group.
    prompts = prompts_of([[*start, *text] for text in documents(12, 6, length=20)])
    (group,) = in_groups(prompts)
    shares = share_out([group], 3)
    assert 3 <= len(shares) <= 4
    for share in shares:
        assert {p.tokens[:520] for p in share}.isdisjoint(p.tokens[:520] for s in shares if s is not share for p in s)
    # The beginning is computed by each, everything else once.
    assert sum(num_computed(share) for share in shares) == num_computed(prompts) + 500 * (len(shares) - 1)
    assert busy(shares, 3) <= 1.2 * (500 + (num_computed(prompts) - 500) / 3)


def test_equal_prompts_beyond_a_fair_part_are_cut_where_the_part_ends():
    prompts = prompts_of([[7] * 10] * 1000, num_answered=10)
    shares = share_out(in_groups(prompts), 4)
    assert [len(share) for share in shares] == [250] * 4


def test_few_prompts_are_given_to_all_engines_and_no_engine_gets_an_empty_share():
    prompts = prompts_of([[n, n] for n in range(100)])
    shares = share_out(in_groups(prompts), 4)
    assert len([share for share in shares if len(share) >= 24]) == 4
    assert [len(share) for share in share_out(in_groups(prompts[:2]), 8)] == [1, 1]
    assert share_out([], 3) == []
