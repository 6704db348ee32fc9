"""How long a worker will take: least squares over finished requests, one set of terms for each class of worker.

Every coefficient is at least zero, so a prediction never falls when there is more to do and is never negative. Old
observations fade, errors count relative to what was seen, and directions that nobody has seen keep what was assumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from farspan.serve.rates import Mean

_SHORTEST_S, _LONGEST_S = 1e-6, 86_400.0
# How strongly what was assumed holds against one observation: only where nothing else is known.
_ASSUMED = 1e-12
_APART = 1e-12
_ERROR_WEIGHT, _KEEP_WHEN_OFF = 0.1, 0.7

# Seconds of: a prompt, a thousand tokens of it, a thousand tokens that each see a thousand before them.
PREFILL_ASSUMED = (5e-3, 0.1, 1e-3)
# Seconds of: a token, another sequence in the same iteration, a thousand tokens that are looked at.
DECODE_ASSUMED = (5e-3, 5e-4, 1e-4)
# Seconds of: a transfer, a MiB of it.
TRANSFER_ASSUMED = (5e-3, 2e-3)
_THOUSAND, _MIB = 1e-3, 2.0**-20


class Fit:
    """seconds = sum of coefficient * term, refined with every observation."""

    def __init__(self, assumed: Sequence[float], keep: float = 0.98, off: float = 0.4) -> None:
        """`assumed`: coefficients above zero, for as long as nothing was seen.

        With each observation older ones keep `keep` of their weight; much less while predictions are wrong in one
        direction by more than `off` (of a logarithm) on average: then the machine is not what it was.
        """
        # Everything is counted in terms of what was assumed: then all numbers are of the size of one.
        self._assumed, self._keep = np.asarray(assumed, dtype=np.float64), keep
        size = len(self._assumed)
        self._products: NDArray[np.float64] = np.zeros((size, size))
        self._targets: NDArray[np.float64] = np.zeros(size)
        self._shares: NDArray[np.float64] = np.ones(size)
        self._off, self._error = off, Mean(0.0, _ERROR_WEIGHT)
        self.num_seen = 0

    def learn(self, terms: Sequence[float], seconds: float) -> None:
        """One observation. What is not a time (negative, not finite) teaches nothing."""
        if not (math.isfinite(seconds) and seconds >= 0 and all(math.isfinite(term) and term >= 0 for term in terms)):
            return
        seen_s = min(max(seconds, _SHORTEST_S), _LONGEST_S)
        # Relative: a request of a minute must not drown a thousand of a tenth of a second.
        row = np.asarray(terms, dtype=np.float64) * self._assumed / seen_s
        self._error.add(math.log(seen_s / max(self.seconds(terms), _SHORTEST_S)))
        keep = self._keep if abs(self._error.value) < self._off else min(self._keep, _KEEP_WHEN_OFF)
        self._products = keep * self._products + np.outer(row, row)
        self._targets = keep * self._targets + row
        self._shares = _at_least_zero(self._products, self._targets)
        self.num_seen += 1

    def seconds(self, terms: Sequence[float]) -> float:
        """What these terms will take."""
        return float(np.asarray(terms, dtype=np.float64) @ (self._shares * self._assumed))


class Predictor:
    """Times of workers by class, and of transfers."""

    def __init__(self, keep: float = 0.98) -> None:
        self._keep = keep
        self._prefill: dict[str, Fit] = {}
        self._decode: dict[str, Fit] = {}
        self._transfer = Fit(TRANSFER_ASSUMED, keep)

    def prefill_s(self, kind: str, new_tokens: float, context_tokens: float) -> float:
        """Until the first token, when `new_tokens` are computed that see about `context_tokens` each."""
        return self._fit(self._prefill, kind, PREFILL_ASSUMED).seconds(_prefill_terms(new_tokens, context_tokens))

    def decode_s(self, kind: str, running: float, kv_tokens: float) -> float:
        """Between two tokens of a sequence, with `running` of them side by side that hold `kv_tokens`."""
        return self._fit(self._decode, kind, DECODE_ASSUMED).seconds(_decode_terms(running, kv_tokens))

    def transfer_s(self, num_bytes: float) -> float:
        return self._transfer.seconds((1.0, num_bytes * _MIB))

    def learn_prefill(self, kind: str, new_tokens: float, context_tokens: float, seconds: float) -> None:
        self._fit(self._prefill, kind, PREFILL_ASSUMED).learn(_prefill_terms(new_tokens, context_tokens), seconds)

    def learn_decode(self, kind: str, running: float, kv_tokens: float, seconds: float) -> None:
        self._fit(self._decode, kind, DECODE_ASSUMED).learn(_decode_terms(running, kv_tokens), seconds)

    def learn_transfer(self, num_bytes: float, seconds: float) -> None:
        self._transfer.learn((1.0, num_bytes * _MIB), seconds)

    def num_prefills(self, kind: str) -> int:
        """Prompts of this class that were learned from."""
        return self._prefill[kind].num_seen if kind in self._prefill else 0

    def _fit(self, fits: dict[str, Fit], kind: str, assumed: Sequence[float]) -> Fit:
        if kind not in fits:
            fits[kind] = Fit(assumed, self._keep)
        return fits[kind]


def _prefill_terms(new_tokens: float, context_tokens: float) -> tuple[float, float, float]:
    thousands = new_tokens * _THOUSAND
    return 1.0, thousands, thousands * context_tokens * _THOUSAND


def _decode_terms(running: float, kv_tokens: float) -> tuple[float, float, float]:
    return 1.0, running, kv_tokens * _THOUSAND


def _at_least_zero(products: NDArray[np.float64], targets: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x >= 0 with the least x'Px - 2t'x, exactly: with so few terms, every set that may be above zero is tried.

    Where all of them are, at the least of all x, no other set is better.
    """
    size = len(targets)
    # The second part only keeps terms apart that always came in the same proportion.
    held = _ASSUMED + _APART * float(np.trace(products))
    matrix = products + held * np.eye(size)
    wanted = targets + held
    free = np.asarray(np.linalg.solve(matrix, wanted), dtype=np.float64)
    if (free >= 0).all():
        return free
    best, least = np.zeros(size), 0.0
    for count in range(1, size):
        for chosen in combinations(range(size), count):
            part = np.linalg.solve(matrix[np.ix_(chosen, chosen)], wanted[list(chosen)])
            # At its own best, a set's value is -t'x.
            value = -float(wanted[list(chosen)] @ part)
            if (part >= 0).all() and value < least:
                best, least = np.zeros(size), value
                best[list(chosen)] = part
    return best
