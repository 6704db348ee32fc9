"""Leaving chunks out: the expectation over every possible draw, written out, against exact gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from math import comb, perm, prod

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from tests.support.decoders import decoder_config
from tests.support.packed import num_labels, random_batch
from torch import Tensor

from farspan.batch import IGNORED_LABEL, PackedBatch
from farspan.chunked.layout import ChunkedLayout
from farspan.chunked.seco import ChunkedStep
from farspan.chunked.spaco import (
    Draw,
    bernoulli,
    count_labels,
    draw_chunks,
    even_probabilities,
    every_chunk,
    importance_probabilities,
    label_scores,
    without_replacement,
    without_replacement_of,
)
from farspan.config.check import CHUNK_SAMPLINGS
from farspan.errors import ConfigError
from farspan.models.attention import use_farspan_attention
from farspan.train.loss import PackedLoss
from farspan.verify.shrink import VOCAB, small_model

NUM_CHUNKS, CHUNK_TOKENS = 5, 4
BATCH = random_batch((0, 7, NUM_CHUNKS * CHUNK_TOKENS), VOCAB)


@cache
def step_and_loss() -> tuple[ChunkedStep, PackedLoss]:
    # Its norms are computed in the type of the model: a gradient is linear to the last digit of fp64.
    model = small_model(decoder_config("gpt_neox"))
    use_farspan_attention(model)
    return ChunkedStep(model, CHUNK_TOKENS), PackedLoss(model, CHUNK_TOKENS)


def gradient(draw: Draw, batch: PackedBatch = BATCH) -> Tensor:
    """All gradients of one sequence as one vector."""
    step, loss = step_and_loss()
    for p in loss.parameters():
        p.grad = torch.zeros_like(p)
    shard = step.lay_out(batch.num_tokens).shard(batch, 0)
    step.forward_backward(loss, shard, num_labels(batch), draw)
    return torch.cat([p.grad.flatten() for p in loss.parameters() if p.grad is not None])


def bias(outcomes: Iterator[tuple[float, Draw]]) -> float:
    """Norm of (expected gradient - exact one) over the norm of the exact one."""
    exact = gradient(every_chunk(NUM_CHUNKS))
    expected = sum((chance * gradient(draw) for chance, draw in outcomes), torch.zeros_like(exact))
    return float((expected - exact).norm() / exact.norm())


def independent(probabilities: tuple[float, ...]) -> Iterator[tuple[float, Draw]]:
    """Every subset of chunks, with its probability."""
    for kept in product([True, False], repeat=NUM_CHUNKS):
        chance = prod(p if k else 1 - p for p, k in zip(probabilities, kept, strict=True))
        if chance > 0:
            yield chance, Draw(tuple(1 / p if k else 0.0 for p, k in zip(probabilities, kept, strict=True)))


@pytest.mark.parametrize(
    "probabilities",
    [(0.4,) * NUM_CHUNKS, (0.9, 0.2, 0.5, 0.7, 1.0)],
    ids=["equal", "importance, 1 for the last"],
)
def test_independent_chunks_with_weights_1_over_p_have_no_bias(probabilities: tuple[float, ...]) -> None:
    assert bias(independent(probabilities)) < 1e-12


def test_a_fixed_number_of_chunks_is_labelled_biased_and_is_less_so_the_more_are_kept() -> None:
    def outcomes(kept: int) -> Iterator[tuple[float, Draw]]:
        for chosen in combinations(range(NUM_CHUNKS), kept):
            yield 1 / comb(NUM_CHUNKS, kept), without_replacement_of(NUM_CHUNKS, chosen, clip=None)

    biases = [bias(outcomes(kept)) for kept in (1, 2, 3, 4)]
    assert biases == sorted(biases, reverse=True)
    assert 0.02 < biases[0] < 1.0
    assert biases[3] > 1e-3
    drawn = without_replacement(NUM_CHUNKS, 2, torch.Generator().manual_seed(0))
    assert drawn.biased
    assert drawn.num_kept == 2
    assert set(drawn.weights) == {0.0, 2.0}, "5 / 2 is clipped at 2"


def test_the_published_form_is_off_by_what_its_draws_do_to_paths_through_several_chunks() -> None:
    """A path through m chunks should count 1; kept t of k without replacement it counts (k/t)^m t!/(t-m)! (k-m)!/k!.

    Weighting every chunk w makes the gradient a polynomial in w whose coefficients are the paths through m chunks.
    The published 14.4 / 6.1 / 3.1 / 1.6 % at 1..4 of 6 are of a model that was not published; their ratios lie where
    this law puts them: between those of paths through two chunks and through three.
    """
    points = torch.tensor([0.4, 0.7, 1.0, 1.3, 1.6], dtype=torch.float64)
    by_weight = torch.stack([gradient(Draw((float(w),) * NUM_CHUNKS)) for w in points])
    through = torch.linalg.solve(torch.stack([points**m for m in range(1, NUM_CHUNKS + 1)], dim=1), by_weight)
    exact = gradient(every_chunk(NUM_CHUNKS))
    for kept in (1, 2, 3, 4):
        mean = sum(
            gradient(without_replacement_of(NUM_CHUNKS, chosen, clip=None))
            for chosen in combinations(range(NUM_CHUNKS), kept)
        ) / comb(NUM_CHUNKS, kept)
        off = torch.tensor([counted(NUM_CHUNKS, kept, m) - 1 for m in range(1, NUM_CHUNKS + 1)], dtype=torch.float64)
        assert float((mean - exact - off @ through).norm() / exact.norm()) < 1e-10
    for kept, share in ((2, 6.1 / 14.4), (3, 3.1 / 14.4), (4, 1.6 / 14.4)):
        assert 1 - counted(6, kept, 2) < share < 1 - counted(6, kept, 3)


def counted(num_chunks: int, kept: int, num_hops: int) -> float:
    """What a path through `num_hops` chunks counts on average."""
    return float((num_chunks / kept) ** num_hops * perm(kept, num_hops) / perm(num_chunks, num_hops))


def test_draws_follow_their_probabilities_and_only_the_generator() -> None:
    probabilities = (1.0, 0.25, 0.75)
    draws = [bernoulli(probabilities, torch.Generator().manual_seed(seed)) for seed in range(2000)]
    assert draws == [bernoulli(probabilities, torch.Generator().manual_seed(seed)) for seed in range(2000)]
    mean = torch.tensor([draw.weights for draw in draws]).mean(0)
    # One over p in p of the cases; three standard errors of the least likely are 0.12.
    assert torch.allclose(mean, torch.ones(3), atol=0.12)
    assert not any(draw.biased for draw in draws)
    assert all(draw.weights[0] == 1.0 for draw in draws)


def test_chunks_with_labels_are_always_kept_where_that_is_asked_for() -> None:
    labels_T = torch.full((10,), -100)
    labels_T[5] = 3
    num_labels = count_labels(labels_T, [(0, 4), (4, 8), (8, 10)], -100)
    assert num_labels == (0, 1, 0)
    has_labels = [number > 0 for number in num_labels]
    assert even_probabilities(0.3, has_labels, keep_labelled=True) == (0.3, 1.0, 0.3)
    assert even_probabilities(0.3, has_labels) == (0.3, 0.3, 0.3)


def test_importance_keeps_as_many_as_expected_and_never_more_than_surely() -> None:
    found = importance_probabilities([1.0, 1.0, 2.0, 100.0], expected=2.0)
    assert found == pytest.approx((0.25, 0.25, 0.5, 1.0))
    assert importance_probabilities([1.0, 5.0], expected=2) == (1.0, 1.0)


@given(st.lists(st.integers(0, 4096), min_size=1, max_size=40), st.floats(0.01, 1.0))
def test_by_labels_as_many_chunks_are_drawn_as_evenly_and_none_less_than_half_as_often(
    num_labels: list[int], keep: float
) -> None:
    found = importance_probabilities(label_scores(num_labels), keep * len(num_labels))
    assert sum(found) == pytest.approx(keep * len(num_labels))
    assert all(keep / 2 <= p * (1 + 1e-9) <= 1 + 2e-9 for p in found)
    by_probability = [p for _, p in sorted(zip(num_labels, found, strict=True))]
    assert by_probability == sorted(by_probability), "more labels, more often"


@pytest.mark.parametrize("labelled", [(3, 9, 10, 12, 13, 14, 18), (17, 18)], ids=["a conversation", "an answer"])
def test_draws_by_labels_have_no_bias_and_vary_less_than_even_ones_that_cost_the_same(
    labelled: tuple[int, ...],
) -> None:
    labels_T = torch.full_like(BATCH.labels_T, IGNORED_LABEL)
    labels_T[list(labelled)] = BATCH.tokens_T[[t + 1 for t in labelled]]
    batch = replace(BATCH, labels_T=labels_T)
    chunks = ChunkedLayout(BATCH.num_tokens, 1, CHUNK_TOKENS).chunks
    scores = label_scores(count_labels(labels_T, chunks, IGNORED_LABEL))
    exact, spread = gradient(every_chunk(NUM_CHUNKS), batch), {}
    for name, scored in (("even", (1.0,) * NUM_CHUNKS), ("by labels", scores)):
        found = [
            (p, gradient(draw, batch)) for p, draw in independent(importance_probabilities(scored, 0.5 * NUM_CHUNKS))
        ]
        mean = sum((p * got for p, got in found), torch.zeros_like(exact))
        assert float((mean - exact).norm() / exact.norm()) < 1e-12
        spread[name] = sum(p * float((got - exact).norm()) ** 2 for p, got in found)
    assert spread["by labels"] < 0.95 * spread["even"]


def test_every_sampling_is_drawn_as_its_name_says_and_only_one_is_biased() -> None:
    draws = {
        s: [draw_chunks(s, (0, 8, 0, 0), 0.5, torch.Generator().manual_seed(n)) for n in range(400)]
        for s in CHUNK_SAMPLINGS
    }
    assert {s for s, found in draws.items() if any(draw.biased for draw in found)} == {"without_replacement"}
    assert {draw.num_kept for draw in draws["without_replacement"]} == {2}
    assert all(draw.weights[1] == 1.0 for draw in draws["importance"]), "its eight labels are all there are"
    # 400 draws of four chunks: three standard deviations of their number are 60.
    for sampling in ("independent", "importance"):
        assert abs(sum(draw.num_kept for draw in draws[sampling]) - 800) < 60


def test_a_sequence_without_labels_is_drawn_evenly() -> None:
    assert label_scores((0, 0, 0)) == (1.0, 1.0, 1.0)


def test_what_could_never_be_unbiased_is_refused() -> None:
    with pytest.raises(ConfigError, match="a chunk never seen never counts"):
        bernoulli((0.5, 0.0), torch.Generator())
    with pytest.raises(ConfigError, match="must be positive"):
        importance_probabilities([1.0, 0.0], 1.0)
    with pytest.raises(ConfigError, match="must be 1 to 5"):
        without_replacement(5, 6, torch.Generator())
