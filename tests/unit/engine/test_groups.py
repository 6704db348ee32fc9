"""Groups of prompts that share a beginning save as much as any disjoint groups could."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from farspan.engine.groups import PrefixGroup, group_by_prefix


def best_by_trial(prompts):
    """The most that any set of beginnings saves, none of which begins with another."""
    starts = sorted({tuple(prompt[:length]) for prompt in prompts for length in range(1, len(prompt) + 1)})
    worth = {
        start: len(start) * (sum(tuple(prompt[: len(start)]) == start for prompt in prompts) - 1) for start in starts
    }
    starts = [start for start in starts if worth[start]]
    best = 0
    for count in range(len(starts) + 1):
        for chosen in combinations(starts, count):
            if not any(a != b and b[: len(a)] == a for a in chosen for b in chosen):
                best = max(best, sum(worth[start] for start in chosen))
    return best


@pytest.mark.parametrize("seed", range(60))
def test_no_choice_of_beginnings_saves_more(seed):
    chance = random.Random(seed)
    prompts = [[chance.randrange(2) for _ in range(chance.randint(1, 5))] for _ in range(chance.randint(1, 7))]
    groups = group_by_prefix(prompts)
    assert sorted(member for group in groups for member in group.members) == list(range(len(prompts)))
    for group in groups:
        start = prompts[group.members[0]][: group.num_shared]
        if start:
            alike = [number for number, prompt in enumerate(prompts) if prompt[: len(start)] == start]
            assert sorted(group.members) == alike
    assert sum(group.num_saved for group in groups) == best_by_trial(prompts)


def test_groups_that_mostly_decode_come_first():
    prompts = [[1] * 50 + [2], [1] * 50 + [3], [4, 5], [4, 6]]
    groups = group_by_prefix(prompts, [10, 10, 10, 10])
    assert groups == [PrefixGroup(1, (2, 3)), PrefixGroup(50, (0, 1))]


def test_a_short_beginning_makes_no_group():
    assert group_by_prefix([[1, 2], [1, 3]], least_tokens=2) == [PrefixGroup(0, (0,)), PrefixGroup(0, (1,))]


def test_many_prompts_that_are_all_alike_or_nested_are_grouped_without_recursion():
    assert group_by_prefix([[7] * 3] * 5000) == [PrefixGroup(3, tuple(range(5000)))]
    nested = [[1] * length for length in range(1, 2000)]
    assert sorted(m for group in group_by_prefix(nested) for m in group.members) == list(range(1999))
