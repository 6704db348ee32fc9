"""Ray Serve's door to one replica: a call says which it is for, and any other takes it when that one is gone or full.

The id travels as the session of the call, the only field of a call that a request router of Serve sees besides its
arguments.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

_OTHERS_TRIED = 2


class TargetedRouter(FIFOMixin, RequestRouter):
    """The replica that a call names, then any two of the others; a call that names none: the shorter of two queues."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        wanted = ""
        if pending_request is not None:
            wanted = pending_request.metadata.session_id
            # Otherwise Serve asks again at once, and its event loop does nothing else, until somebody has room.
            pending_request.routing_context.should_backoff = True
        return ranked([replica.replica_id.unique_id for replica in candidate_replicas], candidate_replicas, wanted)

    def _get_pending_request_matching_metadata(self, request_metadata: Any = None) -> PendingRequest | None:
        """Who gets the replica that was looked for: the oldest call that names the same one.

        The id of a call will not do: all calls on behalf of one HTTP request share it.
        """
        if request_metadata is None:
            return None
        return oldest_naming(request_metadata.session_id, self._pending_requests_to_fulfill)


def oldest_naming(wanted: str, pending: Iterable[Any]) -> Any:
    """The first of the calls still waiting that names `wanted`, or none."""
    return next((one for one in pending if not one.future.done() and one.metadata.session_id == wanted), None)


def ranked(ids: Sequence[str], replicas: Sequence[Any], wanted: str) -> list[list[Any]]:
    """Whom to ask first, and whom then."""
    named = [replica for name, replica in zip(ids, replicas, strict=True) if name == wanted]
    others = [replica for name, replica in zip(ids, replicas, strict=True) if name != wanted]
    drawn = random.sample(others, min(_OTHERS_TRIED, len(others)))
    return [rank for rank in (named, drawn) if rank]
