"""How much each key may use: requests and tokens a minute, answers at the same time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from farspan.serve.keys import ApiKey
from farspan.serve.shape import ApiError

_MINUTE_S = 60.0
# When an open request ends is not known; a client that asks again after this long wastes little.
_OPEN_RETRY_S = 1


class Bucket:
    """Fills evenly up to what a minute gives. It may be emptied below zero: a debt is waited for."""

    def __init__(self, per_minute: int, now_s: float) -> None:
        self._per_minute, self._level, self._at_s = per_minute, float(per_minute), now_s

    def wait_s(self, now_s: float) -> float:
        """Seconds until one may be taken."""
        self._fill(now_s)
        return max(0.0, (1.0 - self._level) * _MINUTE_S / self._per_minute)

    def take(self, amount: int, now_s: float) -> None:
        self._fill(now_s)
        self._level -= amount

    def _fill(self, now_s: float) -> None:
        gained = (now_s - self._at_s) * self._per_minute / _MINUTE_S
        self._level, self._at_s = min(float(self._per_minute), self._level + gained), now_s


class Meter:
    """What one key uses."""

    def __init__(self, key: ApiKey, clock: Callable[[], float]) -> None:
        allowance, now_s = key.allowance, clock()
        self._clock, self._most_open, self._num_open = clock, allowance.concurrent, 0
        per_minute = {"requests": allowance.requests_per_minute, "tokens": allowance.tokens_per_minute}
        self._buckets = {what: Bucket(most, now_s) for what, most in per_minute.items() if most is not None}

    @contextmanager
    def admitted(self, num_answers: int = 1) -> Iterator[None]:
        """A request for as long as it is answered.

        Raises ApiError: 429, which says when to come again; 400 for more answers than ever go in.
        """
        self._refuse_many(num_answers)
        now_s = self._clock()
        for what, bucket in self._buckets.items():
            if (wait_s := bucket.wait_s(now_s)) > 0:
                after_s = max(1, math.ceil(wait_s))
                message = f"this key has used its {what} of the minute; try again in {after_s} s"
                raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=after_s)
        if (requests := self._buckets.get("requests")) is not None:
            requests.take(1, now_s)
        self._num_open += num_answers
        try:
            yield
        finally:
            self._num_open -= num_answers

    def charge(self, num_tokens: int) -> None:
        """Tokens of a prompt when it is read, of an answer when they come."""
        if (tokens := self._buckets.get("tokens")) is not None:
            tokens.take(num_tokens, self._clock())

    def _refuse_many(self, num_answers: int) -> None:
        most = self._most_open
        if most is None or self._num_open + num_answers <= most:
            return
        if num_answers > most:
            # Waiting would not help.
            message = f"n: prompts times n must be at most {most} with this key, got {num_answers}; ask for fewer"
            raise ApiError(400, message, code="invalid_value", param="n")
        message = f"{self._num_open} answers of this key are on their way, at most {most} may be"
        raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=_OPEN_RETRY_S)


class Limits:
    """A meter for each key."""

    def __init__(self, keys: tuple[ApiKey, ...], clock: Callable[[], float] = time.monotonic) -> None:
        self._meters = {key.digest: Meter(key, clock) for key in keys}

    def of(self, key: ApiKey) -> Meter:
        return self._meters[key.digest]
