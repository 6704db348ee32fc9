"""Roles as quotas: how much of an iteration each worker gives to prompts and to answers. Pure.

A worker keeps its quota only while both kinds of work are there: nobody idles for the sake of a role.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from farspan.serve.load import WorkerLoad

# A smaller change of what arrives moves no role.
_STEADY = 0.1


@dataclass(frozen=True, slots=True)
class Quota:
    """Most tokens of prompts, and most sequences that decode, in an iteration that has both; None: no limit."""

    prefill_tokens: int | None = None
    decode_tokens: int | None = None


NO_QUOTA = Quota()


@dataclass(frozen=True, slots=True)
class Orders:
    """What the ingress tells a worker when it asks how it stands."""

    known_prefixes: int = -1
    """Version of the names it knows already."""
    quota: Quota | None = None
    """The role from now on; none: as before."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What arrives, in seconds of one worker's time for every second."""

    prefill: float
    decode: float

    @property
    def share(self) -> float | None:
        """Of prompts; none while nothing arrives."""
        whole = self.prefill + self.decode
        return self.prefill / whole if whole > 0 else None


def share_quotas(workers: Sequence[WorkerLoad], share: float) -> dict[str, Quota]:
    """The quota of each worker when a `share` of all their time belongs to prompts.

    Prefill workers give first, whole workers before parts of one, so that most workers do one thing. Nobody gives
    everything: a page of prompt and one sequence get on everywhere.
    """
    left = share * len(workers)
    quotas: dict[str, Quota] = {}
    for worker in sorted(workers, key=lambda w: (w.deployment != "prefill", w.worker)):
        given = min(1.0, max(0.0, left))
        left -= given
        quotas[worker.worker] = _quota(worker, given)
    return quotas


def _quota(worker: WorkerLoad, given: float) -> Quota:
    prefill = max(worker.page_tokens, math.ceil(given * worker.max_batch_tokens))
    decode = max(1, math.ceil((1 - given) * worker.max_sequences))
    return Quota(None if given >= 1 else prefill, None if given <= 0 else decode)


def in_force(quota: Quota, num_prompting: int, num_decoding: int, most: Quota) -> Quota:
    """What of a quota holds in an iteration: nothing while there is work of one kind only.

    Both kinds get at least their part of what is here, counted in requests: what a worker was sent, it must get done,
    whatever its role is. `most`: what an iteration takes without a quota.
    """
    if not num_prompting or not num_decoding:
        return NO_QUOTA
    part = num_prompting / (num_prompting + num_decoding)
    return Quota(
        _at_least(quota.prefill_tokens, part, most.prefill_tokens),
        _at_least(quota.decode_tokens, 1 - part, most.decode_tokens),
    )


def _at_least(given: int | None, part: float, most: int | None) -> int | None:
    return None if given is None or most is None else max(given, math.ceil(part * most))


class Roles:
    """The share of prompts over time. It moves when what arrives has changed for good."""

    def __init__(self) -> None:
        self._share: float | None = None

    def assign(self, workers: Sequence[WorkerLoad], demand: Demand) -> dict[str, Quota]:
        """The quotas from now on. While nothing has arrived yet, nobody has one."""
        share = demand.share
        if share is not None and (self._share is None or abs(share - self._share) > _STEADY):
            self._share = share
        return {w.worker: NO_QUOTA for w in workers} if self._share is None else share_quotas(workers, self._share)
