"""Objects under one prefix of a store: the slowest tier, and the only one that outlives this machine.

Regions are objects that exist once something was stored; freeing one deletes it.
"""

from __future__ import annotations

import uuid
from typing import Protocol

import torch
from torch import Tensor

from farspan.errors import TierError
from farspan.memory.nvme import check_digest, digest_of
from farspan.memory.tier import Region, Tier


class Objects(Protocol):
    """What this tier asks of a store; every `farspan.storage` store does it."""

    uri: str

    def read_bytes(self, path: str) -> bytes: ...

    def write_bytes(self, path: str, data: bytes) -> None: ...

    def delete(self, path: str) -> None: ...


class ObjectStoreTier(Tier):
    """`capacity_bytes` below the folder of `objects`. Keys are random: many processes may share the folder."""

    def __init__(self, objects: Objects, capacity_bytes: int, *, num_threads: int = 8) -> None:
        super().__init__(f"objects:{objects.uri}", "object", capacity_bytes, num_threads)
        self._objects = objects

    def _reserve(self, nbytes: int, owner: str) -> object:
        return f"{uuid.uuid4().hex}.bin"

    def _release(self, region: Region) -> None:
        if region.digest is not None:
            self._objects.delete(_key(region))

    def _write(self, region: Region, raw: Tensor) -> None:
        on_cpu = raw.cpu()
        self._objects.write_bytes(_key(region), on_cpu.numpy().tobytes())
        region.digest = digest_of(on_cpu)

    def _read(self, region: Region, raw: Tensor) -> None:
        if region.digest is None:
            raise TierError(self.label, f"nothing is stored in this region of {region.owner}; store before fetching")
        found = torch.frombuffer(bytearray(self._objects.read_bytes(_key(region))), dtype=torch.uint8)
        check_digest(self.label, region, digest_of(found))
        raw.copy_(found[: raw.numel()])


def _key(region: Region) -> str:
    assert isinstance(region.place, str)
    return region.place
