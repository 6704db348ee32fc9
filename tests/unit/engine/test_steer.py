"""Bias, penalties and minimal length change logits as transformers and OpenAI's published formula do."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from farspan.engine.history import Recall
from farspan.engine.request import SamplingParams
from farspan.engine.sampler import SampleRow, choose_tokens
from farspan.engine.steer import steer

VOCAB = 60
PROMPT = [3, 3, 9, 41, 8]
ANSWERED = [5, 9, 9, 9, 5, 30]
EOS = frozenset({2, 17})


def logits_of(rows: int) -> torch.Tensor:
    return 2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def row_of(params: SamplingParams, prompt=PROMPT, answered=ANSWERED) -> SampleRow:
    history = Recall(VOCAB, EOS, torch.device("cpu")).recall("r", params, prompt, answered)
    return SampleRow(params, len(prompt) + len(answered), len(answered), history)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_penalty_equals_transformers(penalty):
    logits = logits_of(1)
    ours = steer(logits, [row_of(SamplingParams(repetition_penalty=penalty))], EOS)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([PROMPT + ANSWERED]), logits.clone())
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, logits)


def test_bias_equals_transformers_and_a_token_named_twice_gets_both():
    logits = logits_of(1)
    bias = {5: 2.5, 9: -100.0, 0: 0.125}
    ours = steer(logits, [row_of(SamplingParams(logit_bias=tuple(bias.items())))], EOS)
    processor = SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})
    theirs = processor(torch.tensor([PROMPT]), logits.clone())
    assert torch.equal(ours, theirs)
    twice = steer(logits, [row_of(SamplingParams(logit_bias=((5, 1.0), (5, 1.0))))], EOS)
    assert torch.equal(twice[0, 5], logits[0, 5] + 2.0)


@pytest.mark.parametrize("num_answered", [0, 5, 6, 7])
def test_minimal_length_equals_transformers_at_every_length(num_answered):
    logits = logits_of(1)
    answered = [5] * num_answered
    ours = steer(logits, [row_of(SamplingParams(min_tokens=6), answered=answered)], EOS)
    processor = MinNewTokensLengthLogitsProcessor(len(PROMPT), 6, sorted(EOS))
    theirs = processor(torch.tensor([PROMPT + answered]), logits.clone())
    assert torch.equal(ours, theirs)


def test_presence_and_frequency_penalties_follow_openais_formula_and_count_the_answer_only():
    logits = logits_of(1)
    params = SamplingParams(presence_penalty=0.75, frequency_penalty=-0.5)
    ours = steer(logits, [row_of(params)], EOS)[0].tolist()
    counts = Counter(ANSWERED)
    for token, score in enumerate(logits[0].tolist()):
        expected = score - counts[token] * -0.5 - (0.75 if counts[token] > 0 else 0.0)
        assert ours[token] == pytest.approx(expected, abs=1e-12)


def test_minimal_length_holds_for_stop_tokens_too_and_not_for_ends_that_are_ignored():
    logits = logits_of(2)
    params = SamplingParams(min_tokens=9, stop_token_ids=frozenset({50}), ignore_eos=True)
    scores = steer(logits, [row_of(params), row_of(SamplingParams())], EOS)
    forbidden = (scores == -torch.inf).nonzero().tolist()
    assert forbidden == [[0, 50]]


def test_rows_that_ask_for_nothing_are_neither_changed_nor_copied():
    logits = logits_of(3)
    plain = row_of(SamplingParams(temperature=0.8))
    assert steer(logits, [plain] * 3, EOS) is logits
    mixed = [plain, row_of(SamplingParams(repetition_penalty=2.0, presence_penalty=1.0)), plain]
    before = logits.clone()
    scores = steer(logits, mixed, EOS)
    assert torch.equal(scores[[0, 2]], logits[[0, 2]])
    assert torch.equal(logits, before)


def test_what_is_remembered_token_by_token_equals_what_is_remembered_at_once():
    params = SamplingParams(repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.1)
    stepwise = row_of(params, answered=[])
    for token in ANSWERED:
        assert stepwise.history.accept(token, True) is False
    logits = logits_of(1)
    whole = row_of(params)
    moved = SampleRow(params, whole.position, whole.num_answered, stepwise.history)
    assert torch.equal(steer(logits, [moved], EOS), steer(logits, [whole], EOS))


def test_log_probabilities_are_the_models_own_before_any_change():
    logits = logits_of(2)
    params = SamplingParams(logprobs=3, temperature=0.7, logit_bias=((12, 50.0),), seed=4)
    for number, choice in enumerate(choose_tokens(logits, [row_of(params)] * 2, EOS)):
        expected = logits[number].log_softmax(-1)
        found = choice.logprobs
        assert (choice.token, found.token) == (12, 12)
        assert found.logprob == pytest.approx(float(expected[12]), abs=1e-12)
        values, order = expected.topk(3)
        assert [token for token, _ in found.top] == order.tolist()
        assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-12)
