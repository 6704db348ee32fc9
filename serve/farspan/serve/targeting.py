"""Ray Serve's door to one replica: a call says which it is for, and any other takes it when that one is gone or full.

The id travels as the session of the call, the only field of a call that a request router of Serve sees besides its
arguments.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

_OTHERS_TRIED = 2


class TargetedRouter(RequestRouter):
    """The replica that a call names, then any two of the others. Calls that name none go to the shorter of two queues.

    No FIFO mixin: it would give the replica that was looked for on behalf of one call to the oldest call.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        wanted = "" if pending_request is None else pending_request.metadata.session_id
        return ranked([replica.replica_id.unique_id for replica in candidate_replicas], candidate_replicas, wanted)


def ranked(ids: Sequence[str], replicas: Sequence[Any], wanted: str) -> list[list[Any]]:
    """Whom to ask first, and whom then."""
    named = [replica for name, replica in zip(ids, replicas, strict=True) if name == wanted]
    others = [replica for name, replica in zip(ids, replicas, strict=True) if name != wanted]
    drawn = random.sample(others, min(_OTHERS_TRIED, len(others)))
    return [rank for rank in (named, drawn) if rank]
