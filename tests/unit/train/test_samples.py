"""The hash of consumed samples: the same for every way to share them, another one when a sample is lost or repeated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
from tests.support.corpus import small_corpus

from farspan.data.reader import Corpus, open_corpus
from farspan.errors import TrainingError
from farspan.train.samples import (
    Place,
    Sample,
    Seen,
    WitnessedReader,
    chain_samples,
    merge_seen,
    refuse_uneven,
    samples_of,
)

TOKENS, SEQUENCES = 6000, range(4)
# Samples -> (numbers of the samples computed together, ranks that do so).
Work = Callable[[int], list[tuple[Sequence[int], Sequence[int]]]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("samples")
    return open_corpus(small_corpus(folder), folder / "cache")


def seen_by(corpus: Corpus, work: Work, sequences: range = SEQUENCES) -> dict[Place, Seen]:
    """What four ranks tell together after a step of `sequences` in which they divide the samples as `work` says."""
    readers = [WitnessedReader(corpus, TOKENS, seed=1) for _ in range(4)]
    samples = [sample for index in sequences for sample in samples_of(readers[0].plan, index)]
    for numbers, members in work(len(samples)):
        for rank in members:
            readers[rank].share([samples[number] for number in numbers], len(members))
    return merge_seen(reader.take() for reader in readers)


def whole_sequences(corpus: Corpus, ranks_per_sequence: int) -> dict[Place, Seen]:
    """The same step on a static mesh of four."""
    readers = [WitnessedReader(corpus, TOKENS, 1, ranks_per_sequence=ranks_per_sequence) for _ in range(4)]
    groups = 4 // ranks_per_sequence
    for index in SEQUENCES:
        for own in range(ranks_per_sequence):
            readers[index % groups * ranks_per_sequence + own].batch(index)
    return merge_seen(reader.take() for reader in readers)


def each_alone(count: int) -> list[tuple[Sequence[int], Sequence[int]]]:
    return [([number], [number * 7 % 4]) for number in reversed(range(count))]


WAYS: dict[str, Work] = {
    "each on a rank of its own, from the last": each_alone,
    "all on one rank": lambda count: [(range(count), [2])],
    "some by any three ranks, the rest by one": lambda count: [
        *[([number], [0, 1, 3]) for number in range(0, count, 2)],
        (range(1, count, 2), [2]),
    ],
    "by all four": lambda count: [([number], range(4)) for number in range(count)],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks_per_sequence", [1, 2, 4])
def test_who_computes_a_sample_leaves_no_trace_in_the_hash(corpus: Corpus, way: str, ranks_per_sequence: int) -> None:
    mesh, any_ranks = whole_sequences(corpus, ranks_per_sequence), seen_by(corpus, WAYS[way])
    assert len(mesh) > len(SEQUENCES), "some sequences hold several documents"
    assert chain_samples("", any_ranks) == chain_samples("", mesh)
    refuse_uneven(any_ranks, TOKENS * len(SEQUENCES))


def test_a_lost_sample_changes_the_hash_and_stops_the_run(corpus: Corpus) -> None:
    whole = seen_by(corpus, each_alone)
    for gone in range(len(whole)):
        lost = seen_by(corpus, lambda count, gone=gone: [one for one in each_alone(count) if one[0] != [gone]])
        assert chain_samples("", lost) != chain_samples("", whole)
        with pytest.raises(TrainingError, match=f"of the {TOKENS * len(SEQUENCES)} tokens of a step were computed"):
            refuse_uneven(lost, TOKENS * len(SEQUENCES))


@pytest.mark.parametrize("again", [[3], [0], [0, 1]], ids=str)
def test_a_repeated_sample_changes_the_hash_and_stops_the_run(corpus: Corpus, again: list[int]) -> None:
    whole = seen_by(corpus, each_alone)
    for number in range(len(whole)):
        twice = seen_by(corpus, lambda count, number=number: [*each_alone(count), ([number], again)])
        assert chain_samples("", twice) != chain_samples("", whole)
        with pytest.raises(TrainingError, match="was computed 2 times in a step instead of once"):
            refuse_uneven(twice, TOKENS * len(SEQUENCES))


def test_a_rank_that_misses_its_share_of_a_document_stops_the_run(corpus: Corpus) -> None:
    reader = WitnessedReader(corpus, TOKENS, seed=1)
    reader.share(samples_of(reader.plan, 0), 2)
    with pytest.raises(TrainingError, match="was computed 1/2 times"):
        refuse_uneven(merge_seen([reader.take(), {}]), TOKENS)


def test_the_hash_knows_which_samples_in_which_order_of_steps(corpus: Corpus) -> None:
    first, second = (seen_by(corpus, each_alone, range(n, n + 1)) for n in (0, 1))
    both = chain_samples(chain_samples("", first), second)
    assert both != chain_samples(chain_samples("", second), first)
    assert both != chain_samples("", first | second)
    assert chain_samples(both, {}) == both


def test_ranks_that_read_other_tokens_at_one_place_are_refused() -> None:
    one, other = (Seen(digest, 5, Fraction(1, 2), 0.0) for digest in (b"a", b"b"))
    with pytest.raises(TrainingError, match="do not hold the same corpus"):
        merge_seen([{Place(4, 0): one}, {Place(4, 0): other}])


def test_a_sample_is_what_the_plan_says_at_its_place(corpus: Corpus) -> None:
    reader = WitnessedReader(corpus, TOKENS, seed=1)
    samples = samples_of(reader.plan, 3)
    assert samples == tuple(Sample(Place(3, number), piece) for number, piece in enumerate(reader.plan.sequence(3)))
    assert sum(sample.num_tokens for sample in samples) == TOKENS
    read = reader.batch(3)
    assert reader.take().keys() == {sample.place for sample in samples}
    assert read.sample_ids == tuple(sample.piece.document for sample in samples)
