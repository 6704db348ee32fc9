"""Who is told to come back later instead of waiting in vain: a pure choice."""

from __future__ import annotations

import math

from farspan.serve.policy import Route

# Nobody should come back in an hour because of a prediction.
_LONGEST_RETRY_S = 300


def wait_before_asking_again_s(route: Route, left_s: float | None, most_wait_s: float | None) -> int | None:
    """Whole seconds after which asking again may help; none: it is let in.

    `left_s`: until the request's deadline; `most_wait_s`: longest wait for a first token that the endpoint takes on.
    """
    if route.first_s is None or not route.predicted:
        return None
    allowed_s = min((limit for limit in (left_s, most_wait_s) if limit is not None), default=math.inf)
    late_s = route.first_s - allowed_s
    if late_s <= 0:
        return None
    # By then, so much of the queue will have been worked off that it would be in time.
    return min(_LONGEST_RETRY_S, max(1, math.ceil(late_s)))
