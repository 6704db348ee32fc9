"""Random numbers are Philox's and belong to one token each; tokens are drawn with the probabilities asked for."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from farspan.engine.philox import uniforms
from farspan.engine.request import SamplingParams
from farspan.engine.sampler import SampleRow, choose_tokens, uniform
from farspan.engine.warp import warp

NO_END: frozenset[int] = frozenset()


@pytest.mark.parametrize("first", [0, -8, -(2**63), 2**63 - 4, 2**63, 2**64 - 8])
def test_neighbouring_seeds_give_different_numbers_over_the_whole_range(first):
    numbers = {uniform(seed, 3) for seed in range(first, first + 8)}
    assert len(numbers) == 8


def test_a_seed_is_taken_modulo_two_to_the_64():
    assert uniform(-1, 5) == uniform(2**64 - 1, 5)
    assert uniform(-1, 5) != uniform(-2, 5)


def test_small_seeds_give_the_numbers_of_philox_as_published():
    for seed in (0, 1, 2**62):
        generator = np.random.Philox(key=[seed, 0], counter=[0, 0, 0, 9])
        assert uniform(seed, 9) == np.random.Generator(generator).random()


@pytest.mark.parametrize("count", [16, 500], ids=["few", "many"])
def test_a_batch_of_numbers_equals_numpys_philox_one_by_one_in_every_bit(count):
    chance = random.Random(4)
    keys = [tuple(chance.randrange(2**64) for _ in range(4)) for _ in range(count)]
    for (seed, request, choice, position), number in zip(keys, uniforms(keys), strict=True):
        key = np.array([seed, request], dtype=np.uint64)
        counter = np.array([0, 0, choice, position], dtype=np.uint64)
        assert number == np.random.Generator(np.random.Philox(key=key, counter=counter)).random()


def test_seed_request_choice_and_position_each_change_the_number():
    base = (7, 7, 7, 7)
    keys = [base, *(tuple(8 if i == changed else 7 for i in range(4)) for changed in range(4))]
    assert len(set(uniforms(keys).tolist())) == 5


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 1.0},
        {"temperature": 0.5, "min_p": 0.02},
        {"temperature": 1.7, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
    ],
)
@pytest.mark.parametrize("key", ["seed", "request", "choice", "position"])
def test_tokens_come_as_often_as_their_probabilities_say_whichever_key_counts(given, key):
    num_draws = 20_000
    logits_V = 1.5 * torch.randn(12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rows = []
    for number in range(num_draws):
        params = SamplingParams(**given) if key == "position" else SamplingParams(**given, **{key: number})
        rows.append(SampleRow(params, number if key == "position" else 3, 0))
    choices = choose_tokens(logits_V.expand(num_draws, -1), rows, NO_END)
    counts = np.bincount([choice.token for choice in choices], minlength=12)
    probs = warp(logits_V[None].clone(), [SamplingParams(**given)]).softmax(-1)[0].numpy()
    assert counts[probs == 0].sum() == 0
    possible = probs > 0
    assert possible.sum() >= 3
    # One test in a thousand would fail by chance; the seeds are fixed, so it fails always or never.
    assert chisquare(counts[possible], probs[possible] * num_draws).pvalue > 1e-3


def test_a_row_gets_the_same_token_alone_and_beside_others_in_any_order():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, 300, generator=generator)
    chance = random.Random(2)
    rows = [
        SampleRow(
            SamplingParams(
                temperature=chance.choice([0.0, 0.7, 1.5]),
                top_k=chance.choice([0, 0, 3, 50]),
                top_p=chance.choice([1.0, 0.9, 0.3]),
                min_p=chance.choice([0.0, 0.1]),
                seed=number,
                logit_bias=((number, 1.0),) if number % 5 == 0 else (),
                logprobs=2 if number % 3 == 0 else None,
            ),
            number,
            0,
        )
        for number in range(40)
    ]
    together = choose_tokens(logits, rows, NO_END)
    order = chance.sample(range(40), 40)
    shuffled = choose_tokens(logits[order], [rows[i] for i in order], NO_END)
    alone = [choose_tokens(logits[i : i + 1], [rows[i]], NO_END)[0] for i in range(40)]
    assert [c.token for c in together] == [c.token for c in alone]
    assert [together[i].token for i in order] == [c.token for c in shuffled]
    assert len({c.token for c in together}) > 20


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_row_without_numbers_is_a_problem_of_its_own(broken):
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(), SamplingParams(temperature=0.9, top_k=4, top_p=0.9, min_p=0.1)] * 2
    rows = [SampleRow(each, 5, 0) for each in params]
    good = [choice.token for choice in choose_tokens(logits, rows, NO_END)]
    logits[2:, 7] = broken
    choices = choose_tokens(logits, rows, NO_END)
    assert [choice.token for choice in choices[:2]] == good[:2]
    assert [choice.problem is None for choice in choices] == [True, True, False, False]
    assert "NaN" in choices[3].problem


def test_the_largest_number_below_one_still_finds_a_token_that_may_be_drawn(monkeypatch):
    logits = torch.full((1, 1000), -1e9, dtype=torch.float64)
    logits[0, 3], logits[0, 500] = 0.0, 0.0
    row = [SampleRow(SamplingParams(temperature=1.0, top_k=2), 0, 0)]
    for number, token in ((1 - 2**-53, 500), (0.0, 3), (0.49, 3), (0.51, 500)):
        monkeypatch.setattr("farspan.engine.sampler.uniforms", lambda keys, number=number: np.array([number]))
        assert choose_tokens(logits, row, NO_END)[0].token == token
