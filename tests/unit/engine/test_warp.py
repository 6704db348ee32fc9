"""Scores are cut as transformers cuts them, row by row, whatever the other rows ask for."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from farspan.engine.request import SamplingParams
from farspan.engine.warp import warp

VOCAB = 501


def random_logits(rows: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_transformers(logits_V: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    chain = LogitsProcessorList([TemperatureLogitsWarper(float(params.temperature))])
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    return chain(torch.zeros(1, 1, dtype=torch.long), logits_V[None].clone())[0]


CASES = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 1.0, "top_k": 5000},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.3, "top_p": 0.999},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.7, "min_p": 0.02},
    {"temperature": 1.5, "top_k": 7, "top_p": 0.95, "min_p": 0.3},
]


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_mixed_rows_are_cut_as_transformers_cuts_each_alone(scale):
    params = [SamplingParams(**case) for case in CASES]
    logits = random_logits(len(params), scale=scale)
    ours = warp(logits.clone(), params)
    kept_counts = set()
    for row, each in enumerate(params):
        theirs = by_transformers(logits[row], each)
        kept = theirs > -torch.inf
        kept_counts.add(int(kept.sum()))
        assert torch.equal(ours[row] > -torch.inf, kept), each
        # Scores differ by a constant: ours have their largest at 0.
        torch.testing.assert_close(ours[row][kept], theirs[kept] - theirs.max(), rtol=1e-12, atol=1e-12)
    assert len(kept_counts) >= 3


def test_a_row_is_cut_the_same_alone_and_beside_any_other_rows():
    params = [SamplingParams(**case) for case in CASES]
    logits = random_logits(len(params), seed=5)
    together = warp(logits.clone(), params)
    for row, each in enumerate(params):
        assert torch.equal(warp(logits[row : row + 1].clone(), [each])[0], together[row])


def test_tokens_that_tie_with_the_last_one_kept_are_kept_too():
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    for given in ({"top_k": 2}, {"top_p": 0.5}):
        kept = warp(logits.clone(), [SamplingParams(temperature=1.0, **given)]) > -torch.inf
        assert kept.tolist() == [[True, True, True, False, True]]


def test_a_tiny_temperature_keeps_the_most_likely_token_and_no_nan():
    scores = warp(random_logits(3), [SamplingParams(temperature=1e-300, top_p=0.9)] * 3)
    assert torch.equal(scores.softmax(-1).argmax(-1), random_logits(3).argmax(-1))
    assert not scores.isnan().any()
