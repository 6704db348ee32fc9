"""A mixture repeats exactly what its weights ask for, and loses nothing."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farspan.config.schema import CorpusConfig, UpsampleConfig
from farspan.data.corpus import build_corpus
from farspan.data.mixture import document_weights
from farspan.data.pack import PackPlan
from farspan.data.reader import Reader, open_corpus
from farspan.errors import ConfigError

# Steps of 0.05 keep a round at 20 epochs at most.
weights_of = st.integers(1, 60).map(lambda twentieths: twentieths * 5)
mixtures = st.lists(st.tuples(st.integers(1, 20), weights_of), min_size=1, max_size=8)
seeds = st.integers(0, 2**64 - 1)


def _stream(plan: PackPlan, num_tokens: int) -> list[tuple[int, int]]:
    """(document, token) of the first tokens."""
    pieces = chain.from_iterable(plan.sequence(index) for index in range(-(-num_tokens // plan.sequence_tokens)))
    return [(piece.document, token) for piece in pieces for token in range(piece.start, piece.stop)][:num_tokens]


@given(mixtures, st.integers(1, 50), seeds)
def test_a_round_of_epochs_holds_every_token_exactly_as_often_as_its_weight(
    mixture: list[tuple[int, int]], sequence_tokens: int, seed: int
) -> None:
    lengths, weights = zip(*mixture, strict=True)
    plan = PackPlan(lengths, sequence_tokens, seed, weights)
    expected = {
        (document, token): plan.epochs_per_round * weight // 100
        for document, (length, weight) in enumerate(mixture)
        for token in range(length)
    }
    both = _stream(plan, 2 * plan.round_tokens)
    assert Counter(both[: plan.round_tokens]) == expected
    assert Counter(both[plan.round_tokens :]) == expected


@given(mixtures, seeds, st.integers(0, 200))
def test_an_epoch_holds_a_document_its_weight_of_times_rounded_down_or_up(
    mixture: list[tuple[int, int]], seed: int, epoch: int
) -> None:
    lengths, weights = zip(*mixture, strict=True)
    times = np.bincount(PackPlan(lengths, 8, seed, weights).order(epoch), minlength=len(lengths))
    assert (times >= np.array(weights) // 100).all()
    assert (times <= -(-np.array(weights) // 100)).all()


@given(mixtures, seeds, st.lists(st.integers(0, 100), min_size=1, max_size=10))
def test_a_mixture_asked_in_any_order_equals_one_asked_in_sequence(
    mixture: list[tuple[int, int]], seed: int, indices: list[int]
) -> None:
    lengths, weights = zip(*mixture, strict=True)
    one, other = (PackPlan(lengths, 7, seed, weights) for _ in range(2))
    in_sequence = [one.sequence(index) for index in range(101)]
    assert [other.sequence(index) for index in indices] == [in_sequence[index] for index in indices]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 30), seeds)
def test_weights_of_one_equal_no_weights(lengths: list[int], sequence_tokens: int, seed: int) -> None:
    plain = PackPlan(lengths, sequence_tokens, seed)
    weighed = PackPlan(lengths, sequence_tokens, seed, [100] * len(lengths))
    assert [plain.sequence(i) for i in range(20)] == [weighed.sequence(i) for i in range(20)]


def test_a_weight_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"0\.01"):
        PackPlan([3, 4], 2, 0, [100, 0])


def test_a_built_mixture_is_read_as_its_sources_and_lengths_ask(tmp_path: Path) -> None:
    for name, lines in (("short", 3), ("long", 400)):
        for number in range(4):
            file = tmp_path / name / f"{number}.txt"
            file.parent.mkdir(exist_ok=True)
            file.write_text("".join(f"{name} {number} {line}\n" for line in range(lines)))
    config = CorpusConfig(
        sources=[{"path": str(tmp_path / "short"), "weight": 2.5}, {"path": str(tmp_path / "long"), "weight": 0.5}],
        output=str(tmp_path / "corpus"),
        pattern="*.txt",
        vocab_size=300,
        upsample=UpsampleConfig(min_tokens=1000, factor=3.0),
    )
    manifest = build_corpus(config, lambda _: None)
    corpus = open_corpus(str(tmp_path / "corpus"), tmp_path / "cache")
    assert [share.documents for share in manifest.sources] == [4, 4]
    assert sum(share.tokens for share in manifest.sources) == manifest.tokens
    weights = document_weights(manifest, corpus.document_lengths)
    assert weights.tolist() == [250] * 4 + [150] * 4
    reader = Reader(corpus, 64, seed=3)
    assert reader.plan.epochs_per_round == 2
    assert reader.plan.round_tokens == 2 * int((weights * corpus.document_lengths).sum()) // 100
    other = Reader(open_corpus(str(tmp_path / "corpus"), tmp_path / "other"), 64, seed=3)
    assert all((reader.batch(i).tokens_T == other.batch(i).tokens_T).all() for i in (50, 3, 0))
