"""The tie between one process and its host's blocks: whatever breaks it, the process goes on and says so once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from farspan.errors import TierError
from farspan.kv.host_cache import BlockCache
from farspan.kv.host_index import HostCounts

logger = logging.getLogger(__name__)

# How often a cache that was lost is looked for.
_REJOIN_S = 10.0


class HostLink:
    """A block cache that is there, or was lost and may be there again. `call` and `join` belong to one thread."""

    def __init__(self, open_cache: Callable[[], BlockCache]) -> None:
        """`open_cache` raises TierError where there is none for now; whatever else it raises, this raises."""
        self._open = open_cache
        self._cache: BlockCache | None = None
        self.lost = ""
        """Why there is none; empty: there is one."""
        self.rejoin_s = _REJOIN_S
        self._asked_at_s = 0.0
        self._corrupt_before = 0
        try:
            self._cache = open_cache()
        except TierError as problem:
            self._lose(problem)

    @property
    def num_corrupt(self) -> int:
        return self._corrupt_before + (0 if self._cache is None else self._cache.num_corrupt)

    def call(self, ask: Callable[[BlockCache], list[bool]]) -> list[bool]:
        """What a call of the cache gives; nothing when there is none."""
        if self.lost or self._cache is None:
            return []
        try:
            return ask(self._cache)
        # Whatever happens out there, this process goes on computing.
        except Exception as problem:
            self._lose(problem)
            return []

    def counts(self) -> HostCounts | None:
        """None: there is no cache."""
        try:
            return None if self.lost or self._cache is None else self._cache.counts()
        except TierError:
            return None

    def is_due(self, now_s: float) -> bool:
        """Whether it is time to look for a cache that was lost; after that, not for a while."""
        due = bool(self.lost) and now_s - self._asked_at_s > self.rejoin_s
        if due:
            self._asked_at_s = now_s
        return due

    def join(self) -> None:
        """Look for it once."""
        try:
            cache = self._open()
        except Exception as problem:
            # It was said when it was lost.
            logger.debug("the host cache is still lost: %s", problem)
            return
        if self._cache is not None and self._cache is not cache:
            self._corrupt_before += self._cache.num_corrupt
            self._cache.close()
        self._cache, self.lost = cache, ""
        logger.warning("KV is kept in host memory again")

    def _lose(self, problem: Exception) -> None:
        self.lost, self._asked_at_s = str(problem) or type(problem).__name__, time.monotonic()
        logger.warning("KV is no longer kept in host memory: %s", problem)
