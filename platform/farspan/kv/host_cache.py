"""Blocks of a prefix cache in host memory: copied out, copied back in, and checked every time.

Whoever reads copies first and checks the copy, not the slot: what becomes of the slot afterwards changes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import xxhash
from torch import Tensor

from farspan.kv.host_index import WRITING_PART, Block, Grant, HostCounts, HostIndex, Loan
from farspan.memory.shared import SharedTier

_OWNER = "blocks of the prefix cache"
# Slots held at a time, for reading or writing.
BATCH_BLOCKS = 64


@dataclass(frozen=True, slots=True)
class Source:
    """What lies in a page, for whoever keeps it."""

    block: Block
    content_B: Tensor
    unchanged: Callable[[], bool]
    """False once the page was given to somebody else, whose bytes may have been copied instead."""


class BlockCache(Protocol):
    """Somewhere outside of the device where blocks wait. Safe to use from several threads; every call ends in time.

    Each method raises TierError when the cache is lost.
    """

    @property
    def num_corrupt(self) -> int:
        """Blocks this process read that were not what was stored."""
        ...

    def find(self, names: Sequence[bytes]) -> list[bool]:
        """Which blocks are here now."""
        ...

    def fetch(self, names: Sequence[bytes], targets: Sequence[Tensor]) -> list[bool]:
        """Fill each target with its block. False: the target holds nothing of use."""
        ...

    def store(self, sources: Sequence[Source]) -> int:
        """Keep what is not here yet, as far as there is room; how many were kept."""
        ...

    def counts(self) -> HostCounts: ...

    def close(self) -> None: ...


class Arbiter(Protocol):
    """`HostIndex` as one client sees it, here or in another process."""

    def find(self, names: Sequence[bytes]) -> list[bool]: ...

    def lend(self, names: Sequence[bytes]) -> list[Loan | None]: ...

    def settle(self, grants: Sequence[Grant]) -> list[bool]: ...

    def reserve(self, blocks: Sequence[Block]) -> list[Grant | None]: ...

    def publish(self, loans: Sequence[Loan]) -> list[bool]: ...

    def abandon(self, grants: Sequence[Grant]) -> list[bool]: ...

    def drop(self, grants: Sequence[Grant]) -> list[bool]: ...

    def counts(self) -> HostCounts: ...

    def close(self) -> None:
        """Give back everything that is reserved or lent."""
        ...


class Seat:
    """One client of an index in the same process."""

    def __init__(self, index: HostIndex, client: int) -> None:
        self._index, self._client = index, client

    def find(self, names: Sequence[bytes]) -> list[bool]:
        return self._index.find(names)

    def lend(self, names: Sequence[bytes]) -> list[Loan | None]:
        return self._index.lend(self._client, names)

    def settle(self, grants: Sequence[Grant]) -> list[bool]:
        return self._index.settle(self._client, grants)

    def reserve(self, blocks: Sequence[Block]) -> list[Grant | None]:
        return self._index.reserve(self._client, blocks)

    def publish(self, loans: Sequence[Loan]) -> list[bool]:
        return self._index.publish(self._client, loans)

    def abandon(self, grants: Sequence[Grant]) -> list[bool]:
        return self._index.abandon(self._client, grants)

    def drop(self, grants: Sequence[Grant]) -> list[bool]:
        return self._index.drop(grants)

    def counts(self) -> HostCounts:
        return self._index.counts()

    def close(self) -> None:
        self._index.leave(self._client)


class HostCache:
    """`BlockCache` over slots of shared memory, of which an arbiter says who may use which."""

    def __init__(self, arbiter: Arbiter, tier: SharedTier) -> None:
        self._arbiter, self._tier = arbiter, tier
        self._num_corrupt = 0
        # More would be refused by the index.
        self._batch = max(1, min(BATCH_BLOCKS, tier.num_slots // WRITING_PART))
        # Over a whole batch: an arbiter that is lost takes the slots back, and nobody may be copying then.
        self._lock = threading.Lock()

    @property
    def num_corrupt(self) -> int:
        return self._num_corrupt

    @classmethod
    def alone(cls, capacity_bytes: int, block_bytes: int) -> HostCache:
        """One that nobody else uses, of this process. Raises TierError when the host has not so much memory."""
        tier = SharedTier.create(capacity_bytes, block_bytes)
        return cls(Seat(HostIndex(tier.num_slots), 0), tier)

    def find(self, names: Sequence[bytes]) -> list[bool]:
        with self._lock:
            return self._arbiter.find(names)

    def fetch(self, names: Sequence[bytes], targets: Sequence[Tensor]) -> list[bool]:
        arrived: list[bool] = []
        for start in range(0, len(names), self._batch):
            some = slice(start, start + self._batch)
            with self._turn():
                arrived += self._fetch(names[some], targets[some])
        return arrived

    def store(self, sources: Sequence[Source]) -> int:
        kept = 0
        for start in range(0, len(sources), self._batch):
            with self._turn():
                kept += self._store(sources[start : start + self._batch])
        return kept

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One batch: whatever goes wrong in it, no slot stays reserved or lent."""
        with self._lock:
            try:
                yield
            except BaseException:
                self._arbiter.close()
                raise

    def _fetch(self, names: Sequence[bytes], targets: Sequence[Tensor]) -> list[bool]:
        answers = self._arbiter.lend(names)
        loans = [loan for loan in answers if loan is not None]
        wanted = [target for loan, target in zip(answers, targets, strict=True) if loan is not None]
        copies = [_on_host(target) for target in wanted]
        self._copy(loans, copies, back=True)
        sound = [digest(copy) == loan.digest for copy, loan in zip(copies, loans, strict=True)]
        self._num_corrupt += sound.count(False)
        self._arbiter.drop([loan for loan, right in zip(loans, sound, strict=True) if not right])
        ours = self._arbiter.settle(loans)
        for target, copy in zip(wanted, copies, strict=True):
            if copy is not target:
                target.copy_(copy)
        good = iter([right and mine for right, mine in zip(sound, ours, strict=True)])
        return [loan is not None and next(good) for loan in answers]

    def _store(self, sources: Sequence[Source]) -> int:
        answers = self._arbiter.reserve([source.block for source in sources])
        grants = [grant for grant in answers if grant is not None]
        granted = [source for grant, source in zip(answers, sources, strict=True) if grant is not None]
        contents = [source.content_B.cpu() for source in granted]
        digests = [digest(content) for content in contents]
        self._copy(grants, contents, back=False)
        # Only now, when the bytes are copied and their digest is made.
        right = [source.unchanged() for source in granted]
        loans = [Loan(g.slot, g.generation, d) for g, d, same in zip(grants, digests, right, strict=True) if same]
        self._arbiter.abandon([grant for grant, same in zip(grants, right, strict=True) if not same])
        return sum(self._arbiter.publish(loans))

    def _copy(self, grants: Sequence[Grant], contents: Sequence[Tensor], *, back: bool) -> None:
        regions = [self._tier.region(grant.slot, _OWNER) for grant in grants]
        move = self._tier.fetch if back else self._tier.store
        transfers = [move(region, content) for region, content in zip(regions, contents, strict=True)]
        for transfer in transfers:
            transfer.finish()

    def counts(self) -> HostCounts:
        with self._lock:
            return self._arbiter.counts()

    def close(self) -> None:
        with self._lock:
            self._arbiter.close()
        self._tier.close()


def digest(content_B: Tensor) -> int:
    """64-bit xxh3 of bytes on the host."""
    return xxhash.xxh3_64_intdigest(content_B.numpy().data)


def _on_host(target: Tensor) -> Tensor:
    """Where the bytes land first: pages of a GPU get them only when they are checked."""
    return target if target.device.type == "cpu" else torch.empty_like(target, device="cpu")
