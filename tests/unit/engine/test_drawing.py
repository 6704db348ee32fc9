"""Tokens are those of plain torch, whether a kernel chooses them, torch, or both."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tests.support.sampling import logits_of

from farspan.engine.philox import uniforms
from farspan.engine.request import SamplingParams
from farspan.engine.sampler import SampleRow, SteadyChoice, choose_tokens
from farspan.kernels.sampling.contract import SURE, Sampling
from farspan.kernels.sampling.native import load_native

NO_END: frozenset[int] = frozenset()
VOCAB = 300


@pytest.fixture
def use(monkeypatch):
    """Has tokens chosen by a kernel, or by none."""
    return lambda kernel: monkeypatch.setattr("farspan.engine.drawing.choose_sampling", lambda *asked: kernel)


def params_of(number: int, chance: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=chance.choice([0.0, 0.5, 1.0, 1.4]),
        top_k=chance.choice([0, 0, 1, 20, 10**30]),
        top_p=chance.choice([1.0, 1.0, 0.9, 0.2]),
        min_p=chance.choice([0.0, 0.0, 0.1]),
        seed=chance.randrange(2**64),
        choice=number % 3,
        logprobs=chance.choice([None, 0, 0, 2]),
    )


def rows_of(count: int, *, biased: bool) -> list[SampleRow]:
    chance = random.Random(count)
    rows = [SampleRow(params_of(number, chance), number, 3) for number in range(count)]
    if biased:
        bias = SamplingParams(temperature=1.0, logit_bias=((5, 2.0),), min_tokens=9, stop_token_ids=frozenset({7}))
        rows[::7] = [SampleRow(bias, number, 3) for number in range(len(rows[::7]))]
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("biased", "cuts"), [(False, True), (True, True), (True, False)])
def test_thousands_of_mixed_rows_get_the_tokens_of_torch_and_are_refused_for_the_same_reasons(
    biased, cuts, dtype, use
) -> None:
    logits, rows = logits_of(1200, VOCAB, dtype), rows_of(1200, biased=biased)
    logits[10::50, 3] = float("nan")
    logits[20::50, 4] = float("inf")
    logits[30::50] = -float("inf")
    use(None)
    want = choose_tokens(logits, rows, NO_END)
    use(Sampling(load_native().sample, cuts))
    got = choose_tokens(logits, rows, NO_END)
    assert [choice.problem for choice in got] == [choice.problem for choice in want]
    sound = [i for i, choice in enumerate(want) if choice.problem is None]
    assert 1000 < len(sound) < 1200
    assert [got[i].token for i in sound] == [want[i].token for i in sound]
    for ours, theirs in ((got[i].logprobs, want[i].logprobs) for i in sound):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert (ours.token, ours.top) == (theirs.token, theirs.top)
            assert ours.logprob == pytest.approx(theirs.logprob, abs=2e-5 if dtype != torch.float64 else 1e-12)


def test_where_sums_in_another_order_might_draw_another_token_torch_decides(use, monkeypatch) -> None:
    def always_last(logits_NV, draws, points_N, told_N=None):
        chosen = load_native().sample(logits_NV, draws, points_N, told_N)
        chosen.tokens_N[chosen.margin_N < SURE] = logits_NV.shape[1] - 1
        return chosen

    logits = torch.zeros(3, 8)
    rows = [SampleRow(SamplingParams(temperature=1.0), number, 0) for number in range(3)]
    monkeypatch.setattr("farspan.engine.sampler.uniforms", lambda keys: np.array([0.25, 0.3, 0.5]))
    use(Sampling(always_last, cuts=True))
    # A point at the end of a token belongs to the next one.
    assert [choice.token for choice in choose_tokens(logits, rows, NO_END)] == [2, 2, 4]


def test_a_log_probability_is_the_same_alone_and_beside_a_row_that_is_steered() -> None:
    logits = logits_of(3, 5000, torch.bfloat16)
    asked = SampleRow(SamplingParams(temperature=1.0, seed=3, logprobs=0), 4, 1)
    steered = SampleRow(SamplingParams(logit_bias=((0, 100.0),), logprobs=0), 4, 1)
    (alone,) = choose_tokens(logits[:1], [asked], NO_END)
    beside = choose_tokens(logits, [asked, steered, asked], NO_END)
    assert alone.logprobs == beside[0].logprobs
    assert beside[1].token == 0
    want = logits[1].double().log_softmax(-1)[0]
    assert beside[1].logprobs.logprob == pytest.approx(float(want), abs=1e-12), "of the model, not of the bias"


def test_a_kernel_that_cannot_cut_is_not_asked_for_what_torch_finds_in_one_launch_and_tells_of_it_alike(use) -> None:
    asked: list[int] = []

    def counted(logits_NV, draws, points_N, told_N=None):
        asked.append(int((draws.temperature_N > 0).sum()))
        return load_native().sample(logits_NV, draws, points_N, told_N)

    use(Sampling(counted, cuts=False))
    logits = logits_of(3, VOCAB, torch.float32)
    greedy = SampleRow(SamplingParams(), 3, 1)
    told = SampleRow(SamplingParams(logprobs=0), 3, 1)
    cut = SampleRow(SamplingParams(temperature=1.0, top_p=0.5), 3, 1)
    drawn = SampleRow(SamplingParams(temperature=1.0), 3, 1)
    plain = choose_tokens(logits, [greedy, cut, greedy], NO_END)
    assert asked == []
    alone = choose_tokens(logits, [told, cut, greedy], NO_END)
    beside = choose_tokens(logits, [told, cut, drawn], NO_END)
    assert asked == [0, 1]
    assert alone[0] == beside[0]
    assert [choice.token for choice in plain] == [choice.token for choice in alone]


@pytest.mark.parametrize("kernel", [None, "native", "native without cuts"])
def test_steady_rows_get_the_tokens_that_they_get_step_by_step(kernel, use) -> None:
    use(None if kernel is None else Sampling(load_native().sample, cuts=kernel == "native"))
    params = [params_of(number, random.Random(number)) for number in range(40)]
    steady = SteadyChoice(params, [number * 10 for number in range(40)], logits_of(40, VOCAB, torch.float32))
    for step in range(35):
        logits = logits_of(40, VOCAB, torch.float32, seed=step)
        tokens, highest = steady.choose(logits)
        rows = [SampleRow(each, number * 10 + step, 3) for number, each in enumerate(params)]
        assert tokens.tolist() == [choice.token for choice in choose_tokens(logits, rows, NO_END)]
        assert torch.equal(highest.double(), logits.amax(-1).double())


def test_random_numbers_of_a_row_do_not_depend_on_greedy_rows_beside_it() -> None:
    key = (2**63 + 5, 1, 2, 3)
    assert uniforms([(0, 0, 0, 0), key])[1] == uniforms([key])[0]
