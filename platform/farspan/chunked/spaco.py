"""Which chunks get a backward pass, and how much each counts. Pure but for the generator that is passed in.

A chunk that is computed with probability p counts 1 / p: both its own loss and the gradients later chunks left for
its keys are multiplied by it. A gradient reaches a weight along paths that go back in time through distinct chunks,
each kept independently of the others, so the expectation of every gradient is the exact one.
Source: SpaCO (Li et al. 2025, sparse chunk-wise optimization). Its published form keeps t of k chunks without
replacement; chunks are then not independent and the expectation is off. It is here for comparison, labelled biased.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Draw:
    """`weights[i]` is what chunk i counts, 0: it gets no backward pass."""

    weights: tuple[float, ...]
    biased: bool = False

    @property
    def num_kept(self) -> int:
        return sum(weight > 0 for weight in self.weights)


def every_chunk(num_chunks: int) -> Draw:
    """SeCO: nothing is left out."""
    return Draw((1.0,) * num_chunks)


def bernoulli(probabilities: Sequence[float], generator: torch.Generator) -> Draw:
    """Keep each chunk independently: unbiased. Equal generators give equal draws, as ranks of one step need."""
    _refuse_impossible(probabilities)
    chance_K = torch.rand(len(probabilities), generator=generator, dtype=torch.float64, device=generator.device)
    return Draw(tuple(1 / p if c < p else 0.0 for p, c in zip(probabilities, chance_K.tolist(), strict=True)))


def without_replacement(num_chunks: int, kept: int, generator: torch.Generator, clip: float | None = 2.0) -> Draw:
    """The published form: `kept` chunks of all, each counting k / t, at most `clip`. Biased.

    Raises:
        ConfigError: more chunks than there are, or none.
    """
    if not 1 <= kept <= num_chunks:
        raise ConfigError("kept chunks", f"must be 1 to {num_chunks}", kept, f"use {min(max(kept, 1), num_chunks)}")
    order_K = torch.randperm(num_chunks, generator=generator, device=generator.device)
    return without_replacement_of(num_chunks, order_K[:kept].tolist(), clip)


def without_replacement_of(num_chunks: int, chosen: Sequence[int], clip: float | None = 2.0) -> Draw:
    """The published form for chunks that were chosen."""
    weight = num_chunks / len(chosen)
    weight = weight if clip is None else min(weight, clip)
    return Draw(tuple(weight if i in set(chosen) else 0.0 for i in range(num_chunks)), biased=True)


def even_probabilities(keep: float, labelled: Sequence[bool], *, keep_labelled: bool = False) -> tuple[float, ...]:
    """`keep` for every chunk; with `keep_labelled` 1 for those that hold labels: for long prompts and short answers.

    `labelled` must be the same on every rank that reduces gradients together, or they would wait for each other.
    """
    _refuse_impossible((keep,))
    return tuple(1.0 if keep_labelled and has_labels else keep for has_labels in labelled)


def importance_probabilities(scores: Sequence[float], expected: float) -> tuple[float, ...]:
    """min(1, c * score) with c such that `expected` chunks are kept on average: rarely what matters little.

    Raises:
        ConfigError: a score is not positive (its chunk could never be seen), or more is expected than there is.
    """
    if min(scores) <= 0:
        raise ConfigError("chunk scores", "must be positive", min(scores), "add a floor to every score")
    if not 0 < expected <= len(scores):
        raise ConfigError("expected chunks", f"must be in (0, {len(scores)}]", expected, f"use {len(scores)}")
    sure: set[int] = set()
    while True:
        rest = sum(score for i, score in enumerate(scores) if i not in sure)
        # Summing may leave less than nothing for the last of them.
        factor = max(0.0, expected - len(sure)) / rest if rest > 0 else 0.0
        above = {i for i, score in enumerate(scores) if i not in sure and factor * score >= 1}
        if not above:
            return tuple(1.0 if i in sure else factor * score for i, score in enumerate(scores))
        sure |= above


def label_scores(num_labels: Sequence[float]) -> tuple[float, ...]:
    """What a chunk matters by its labels, for `importance_probabilities`: their number plus its mean over all chunks.

    The mean is for what chunks leave the labels after them: no chunk's probability is below half of an even one's. At
    equal cost draws by these scores vary less than even ones wherever labels lie unevenly (tests enumerate it).
    """
    mean = sum(num_labels) / len(num_labels)
    return tuple(number + mean if mean > 0 else 1.0 for number in num_labels)


def draw_chunks(
    sampling: str, num_labels: Sequence[float], keep: float, generator: torch.Generator, *, keep_labelled: bool = False
) -> Draw:
    """A draw as `memory.chunk_sampling` says, which keeps the share `keep` of all chunks.

    On average, but without replacement, where their number is rounded.
    `num_labels` of each chunk, and the generator, must be the same on every rank that reduces gradients together.
    `keep_labelled` is of independent draws.
    """
    num_chunks = len(num_labels)
    assert sampling == "independent" or not keep_labelled, "the config was checked"
    if sampling == "without_replacement":
        return without_replacement(num_chunks, max(1, round(keep * num_chunks)), generator)
    if sampling == "importance":
        return bernoulli(importance_probabilities(label_scores(num_labels), keep * num_chunks), generator)
    return bernoulli(even_probabilities(keep, [n > 0 for n in num_labels], keep_labelled=keep_labelled), generator)


def count_labels(labels_T: Tensor, chunks: Sequence[tuple[int, int]], ignored: int) -> tuple[float, ...]:
    """How many labels each chunk of a whole sequence holds."""
    return tuple(float((labels_T[start:stop] != ignored).sum()) for start, stop in chunks)


def _refuse_impossible(probabilities: Sequence[float]) -> None:
    wrong = [p for p in probabilities if not 0 < p <= 1]
    if wrong:
        raise ConfigError("chunk probability", "must be in (0, 1]: a chunk never seen never counts", wrong[0], "use 1")
