"""How a worker stands: what it says of itself, and the role it keeps. Called in the engine's thread."""

from __future__ import annotations

from collections.abc import Mapping

from farspan.engine.engine import Engine
from farspan.serve.load import Identity, WorkerLoad, digest
from farspan.serve.quotas import NO_QUOTA, Quota, in_force


class Role:
    """Keeps an engine within a quota, but for iterations that have work of one kind only."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.given = engine, NO_QUOTA
        self._most = Quota(*engine.quotas)
        self._set = self._most

    def take(self, quota: Quota) -> None:
        self.given = quota

    def keep(self) -> None:
        """Before every iteration."""
        burden = self._engine.burden
        most = Quota(self._engine.max_batch_tokens, self._engine.max_sequences)
        now = in_force(self.given, len(burden.prompting), burden.num_decoding, most)
        wanted = Quota(
            _least(self._most.prefill_tokens, now.prefill_tokens), _least(self._most.decode_tokens, now.decode_tokens)
        )
        if wanted != self._set:
            self._engine.set_quotas(wanted.prefill_tokens, wanted.decode_tokens)
            self._set = wanted


def load_of(
    engine: Engine,
    identity: Identity,
    quota: Quota,
    started_s: Mapping[str, float],
    now_s: float,
    open_leases: int,
    known_prefixes: int,
) -> WorkerLoad:
    """A snapshot. `started_s`: when each request came; names of pages only where other ones than known are found."""
    burden, pool, cache = engine.burden, engine.pool, engine.prefixes
    layout = pool.layout
    version = -1 if cache is None else cache.version
    page = layout.page_tokens / layout.num_groups
    return WorkerLoad(
        worker=identity.worker,
        deployment=identity.deployment,
        incarnation=identity.incarnation,
        kind=identity.kind,
        weights=layout.model,
        layout=layout.fingerprint(),
        page_tokens=layout.page_tokens,
        token_bytes=layout.whole_page_bytes / page,
        max_batch_tokens=engine.max_batch_tokens,
        max_sequences=engine.max_sequences,
        prefill_tokens=quota.prefill_tokens,
        decode_tokens=quota.decode_tokens,
        queue_tokens=burden.queue_tokens,
        oldest_wait_s=max((now_s - started_s[name] for name in burden.prompting if name in started_s), default=0.0),
        num_running=burden.num_decoding,
        num_waiting=len(burden.prompting),
        kv_tokens=burden.kv_tokens,
        free_tokens=int(pool.num_free * page),
        pool_tokens=int(pool.num_pages * page),
        open_leases=open_leases,
        travels=engine.pages_are_all,
        prefixes=None if cache is None or version == known_prefixes else digest(cache.names),
        prefix_version=version,
        adapters={name: engine.adapters.scope(name).adapter for name in engine.adapters.names},
    )


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
