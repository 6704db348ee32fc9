"""Whether a failed run is started again. Pure.

What a worker raised on purpose is the truth about the run and would come again. What happened to a worker (a killed
process, a lost node, a broken connection) is not, and is forgiven `max_restarts` times in an hour, but not twice in a
row with the same words at the same step: that is a defect, not bad luck.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

WINDOW_S = 3600.0


@dataclass(frozen=True, slots=True)
class Failure:
    """What ended one attempt."""

    reason: str
    step: int
    """Steps the attempt had told of when it ended."""
    died: bool
    """A process or a node was lost, as against an exception in a living one."""


@dataclass
class RestartBudget:
    """Failures of one run, and how many more are forgiven."""

    max_restarts: int
    _times_s: deque[float] = field(default_factory=deque)
    _last: Failure | None = None

    def refusal(self, failure: Failure, now_s: float) -> str | None:
        """None: start again. Otherwise why not, as the end of a sentence. `now_s` is a monotonic clock."""
        while self._times_s and now_s - self._times_s[0] > WINDOW_S:
            self._times_s.popleft()
        again = self._last is not None and not failure.died and self._last == failure
        self._last = failure
        if again:
            return f"it failed twice in the same way after step {failure.step}"
        if len(self._times_s) >= self.max_restarts:
            return f"train.max_restarts={self.max_restarts} failures in an hour were forgiven already"
        self._times_s.append(now_s)
        return None
