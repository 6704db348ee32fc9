"""How long a worker will take: least squares over finished requests, one set of terms for each class of worker.

Every coefficient is at least zero, so a prediction never falls when there is more to do and is never negative. Old
observations fade, errors count relative to what was seen, and directions that nobody has seen keep what was assumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

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
        self._assumed, self._keep = tuple(assumed), keep
        size = len(self._assumed)
        self._products = [[0.0] * size for _ in range(size)]
        self._targets, self._shares = [0.0] * size, [1.0] * size
        self._off, self._error = off, Mean(0.0, _ERROR_WEIGHT)
        self.num_seen = 0

    def learn(self, terms: Sequence[float], seconds: float) -> None:
        """One observation. What is not a time (negative, not finite) teaches nothing."""
        if not (math.isfinite(seconds) and seconds >= 0 and all(math.isfinite(term) and term >= 0 for term in terms)):
            return
        seen_s = min(max(seconds, _SHORTEST_S), _LONGEST_S)
        # Relative: a request of a minute must not drown a thousand of a tenth of a second.
        row = [term * assumed / seen_s for term, assumed in zip(terms, self._assumed, strict=True)]
        self._error.add(math.log(seen_s / max(self.seconds(terms), _SHORTEST_S)))
        keep = self._keep if abs(self._error.value) < self._off else min(self._keep, _KEEP_WHEN_OFF)
        for line, own in zip(self._products, row, strict=True):
            line[:] = [keep * value + own * other for value, other in zip(line, row, strict=True)]
        self._targets = [keep * value + own for value, own in zip(self._targets, row, strict=True)]
        self._shares = _at_least_zero(self._products, self._targets)
        self.num_seen += 1

    def seconds(self, terms: Sequence[float]) -> float:
        """What these terms will take."""
        known = zip(terms, self._shares, self._assumed, strict=True)
        return sum(term * share * assumed for term, share, assumed in known)


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


def _at_least_zero(products: Sequence[Sequence[float]], targets: Sequence[float]) -> list[float]:
    """The x >= 0 with the least x'Px - 2t'x, exactly: with so few terms, every set that may be above zero is tried.

    Where all of them are, at the least of all x, no other set is better.
    """
    size = len(targets)
    # The second part only keeps terms apart that always came in the same proportion.
    held = _ASSUMED + _APART * sum(products[i][i] for i in range(size))
    matrix = [[value + held * (i == j) for j, value in enumerate(row)] for i, row in enumerate(products)]
    wanted = [target + held for target in targets]
    free = _solved([row.copy() for row in matrix], wanted.copy())
    if min(free) >= 0:
        return free
    best, least = [0.0] * size, 0.0
    for count in range(1, size):
        for chosen in combinations(range(size), count):
            part = _solved([[matrix[i][j] for j in chosen] for i in chosen], [wanted[i] for i in chosen])
            # At its own best, a set's value is -t'x.
            value = -sum(wanted[i] * x for i, x in zip(chosen, part, strict=True))
            if min(part) >= 0 and value < least:
                best, least = [0.0] * size, value
                for i, x in zip(chosen, part, strict=True):
                    best[i] = x
    return best


def _solved(matrix: list[list[float]], wanted: list[float]) -> list[float]:
    """x of Mx = w, where M is positive definite: nothing has to change places. Takes both apart.

    A request learns twice, and a call of numpy takes longer than all of this.
    """
    size = len(wanted)
    for i in range(size):
        for j in range(i + 1, size):
            part = matrix[j][i] / matrix[i][i]
            for k in range(i, size):
                matrix[j][k] -= part * matrix[i][k]
            wanted[j] -= part * wanted[i]
    for i in reversed(range(size)):
        wanted[i] = (wanted[i] - sum(matrix[i][k] * wanted[k] for k in range(i + 1, size))) / matrix[i][i]
    return wanted
