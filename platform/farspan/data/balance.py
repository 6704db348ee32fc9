"""Hybrid data parallelism: which ranks compute which documents of one optimizer step. Pure.

A document of s tokens gets D(s) = ceil(s / c) ranks, c being what one rank holds: any integer, any ranks. A document
that fits one rank is packed with others on that rank alone and sends nothing. Ranks run different numbers of
micro-batches; what is balanced is the cost of a rank's whole step. The plan is a function of its arguments, so every
rank makes the same one by itself.

Micro-batches that ranks share have one order, the same on all of them, and a rank runs its own ones between: the first
unfinished shared one is next on every rank it needs, so ranks never wait in a circle.
Source: ByteScale (Ge et al. 2025, https://arxiv.org/abs/2502.21231).
See docs/decisions/0022-hybrid-data-parallelism.md.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from farspan.data.even_out import even_out
from farspan.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Cost:
    """What a micro-batch costs, in any unit: quadratic * s^2 + linear * s + each of every document, and `fixed` once.

    Of R ranks that share one, each pays (R - 1) * (message + travel * s / R) more.
    """

    quadratic: float
    linear: float
    fixed: float = 0.0
    each: float = 0.0
    message: float = 0.0
    travel: float = 0.0

    def document(self, tokens: int) -> float:
        """Of one document, wherever it runs."""
        return self.quadratic * tokens * tokens + self.linear * tokens + self.each

    def shared(self, tokens: int, num_ranks: int) -> float:
        """Of a micro-batch of one document, for each of its ranks."""
        sent = (num_ranks - 1) * (self.message + self.travel * tokens / num_ranks)
        return self.document(tokens) / num_ranks + self.fixed + sent


@dataclass(frozen=True, slots=True)
class Spill:
    """Activations that leave the device while it computes, so that a long document needs fewer ranks."""

    forward_s: Cost
    """Seconds of a forward on one rank."""
    kept_bytes: float
    """Kept for backward of each token."""
    bytes_per_s: float
    """To the tier they wait in, for each rank; infinite: `most` always leaves."""
    most: float
    """Share that may leave at most: what backward needs first stays."""

    def share(self, tokens: int) -> float:
        """Of what a document keeps, how much leaves before its forward ends. The number of ranks cancels out: with D
        of them each computes and moves one part in D.
        """
        hidden = self.forward_s.document(tokens) * self.bytes_per_s / (self.kept_bytes * tokens)
        return min(self.most, hidden)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Documents that are computed together: several on one rank, or one on several."""

    documents: tuple[int, ...]
    """Numbers in the step, ascending."""
    ranks: tuple[int, ...]
    """Ascending."""
    cost: float
    """For each of its ranks."""
    spilled: float = 0.0
    """Share of what it keeps that must leave the device, because it was given fewer ranks."""

    @property
    def shared(self) -> bool:
        return len(self.ranks) > 1


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: what each rank computes, in its order."""

    work: tuple[tuple[MicroBatch, ...], ...]
    finish: float
    """When the last rank ends, if costs are times: what ranks wait for each other is in it."""

    @property
    def costs(self) -> tuple[float, ...]:
        """Of each rank."""
        return tuple(sum(micro.cost for micro in own) for own in self.work)

    @property
    def imbalance(self) -> float:
        """The costliest rank over the mean."""
        return max(self.costs) * len(self.costs) / sum(self.costs)


def least_ranks(tokens: int, num_ranks: int, capacity: int, spill: Spill | None) -> int:
    """D(s): the ranks a document needs at least, ceil(s / c), or ceil((1 - r) s / c) where a share r leaves.

    Raises:
        ConfigError: there are not as many.
    """
    least = -(-tokens // capacity)
    if least > 1 and spill is not None:
        least = min(least, max(1, math.ceil((1 - spill.share(tokens)) * tokens / capacity)))
    if least > num_ranks:
        fitting = -(-tokens // num_ranks)
        raise ConfigError(
            "parallel.rank_tokens",
            f"must be at least {fitting} for a document of {tokens} tokens on {num_ranks} processes",
            capacity,
            f"use parallel.rank_tokens={fitting}",
        )
    return least


def balance(lengths: Sequence[int], num_ranks: int, capacity: int, cost: Cost, spill: Spill | None = None) -> StepPlan:
    """The plan of a step with documents of `lengths` tokens on ranks that hold `capacity` tokens each.

    Where capacity alone would make a shared document cost its ranks more than the mean of all, it gets more ranks.

    Raises:
        ConfigError: a document does not fit on all ranks together.
    """
    least = [least_ranks(tokens, num_ranks, capacity, spill) for tokens in lengths]
    mean = max(sum(map(cost.document, lengths)) / num_ranks, 1e-300)
    shared: list[tuple[float, int, int]] = []
    alone: dict[int, float] = {}
    for document, tokens in enumerate(lengths):
        whole = cost.document(tokens)
        if least[document] == 1:
            alone[document] = whole
        else:
            ranks = min(num_ranks, max(least[document], -int(-whole // mean)))
            # Not so many that what they tell each other costs more than one of them saves.
            while ranks > least[document] and cost.shared(tokens, ranks - 1) <= cost.shared(tokens, ranks):
                ranks -= 1
            shared.append((cost.shared(tokens, ranks), document, ranks))
    loads = [0.0] * num_ranks
    together: list[MicroBatch] = []
    for share, document, ranks in sorted(shared, key=lambda one: (-one[0], one[1])):
        chosen = sorted(heapq.nsmallest(ranks, range(num_ranks), key=lambda r: (loads[r], r)))
        for rank in chosen:
            loads[rank] += share
        together.append(MicroBatch((document,), tuple(chosen), share, _spilled(lengths[document], ranks, capacity)))
    # Every token brings its part of what a full micro-batch costs before its first.
    weights = {d: whole + cost.fixed * min(1.0, lengths[d] / capacity) for d, whole in alone.items()}
    own = [_pack(items, rank, lengths, capacity, cost) for rank, items in enumerate(even_out(weights, loads))]
    return _in_order(together, own)


def _spilled(tokens: int, num_ranks: int, capacity: int) -> float:
    """Share of what a micro-batch keeps that its ranks have no room for."""
    return max(0.0, 1 - num_ranks * capacity / tokens)


def _pack(
    documents: Sequence[int],
    rank: int,
    lengths: Sequence[int],
    capacity: int,
    cost: Cost,
) -> list[MicroBatch]:
    """Micro-batches of one rank alone, costliest first: each document into the first that has room."""
    bins: list[list[int]] = []
    room: list[int] = []
    for document in sorted(documents, key=lambda d: (-lengths[d], d)):
        tokens = lengths[document]
        fitting = next((i for i, left in enumerate(room) if left >= tokens), None)
        if fitting is None:
            # One that is too long, because most of it leaves the device, has no room for another.
            bins.append([document])
            room.append(capacity - tokens)
        else:
            bins[fitting].append(document)
            room[fitting] -= tokens
    found = [
        MicroBatch(
            documents=tuple(sorted(held)),
            ranks=(rank,),
            cost=sum(cost.document(lengths[d]) for d in held) + cost.fixed,
            spilled=_spilled(sum(lengths[d] for d in held), 1, capacity),
        )
        for held in bins
    ]
    return sorted(found, key=lambda micro: (-micro.cost, micro.documents))


def _in_order(together: Sequence[MicroBatch], own: Sequence[list[MicroBatch]]) -> StepPlan:
    """Shared micro-batches in the given order; a rank that would wait for the next one runs its own meanwhile."""
    clocks = [0.0] * len(own)
    work: list[list[MicroBatch]] = [[] for _ in own]
    left = [list(micros) for micros in own]

    def run(rank: int, micro: MicroBatch) -> None:
        work[rank].append(micro)
        clocks[rank] += micro.cost

    for micro in together:
        start = max(clocks[rank] for rank in micro.ranks)
        for rank in micro.ranks:
            later = []
            for mine in left[rank]:
                if clocks[rank] + mine.cost <= start:
                    run(rank, mine)
                else:
                    later.append(mine)
            left[rank], clocks[rank] = later, start
            run(rank, micro)
    for rank, micros in enumerate(left):
        for mine in micros:
            run(rank, mine)
    return StepPlan(tuple(map(tuple, work)), max(clocks))
