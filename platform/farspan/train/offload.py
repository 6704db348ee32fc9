"""Where a run's activations wait between forward and backward, and where the KV arena of a run by chunks lies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from farspan.activations.memo_tokens import memo_contexts
from farspan.activations.offload import ActivationOffload, OffloadReport
from farspan.config.schema import MemoryConfig
from farspan.errors import ConfigError
from farspan.memory.available import available_bytes
from farspan.memory.host import DramTier
from farspan.memory.inplace import InPlaceTier
from farspan.memory.open import open_tiers
from farspan.memory.striped import StripedTiers
from farspan.memory.tier import Region, Tier
from farspan.models.parts import decoder_layers, trunk_and_head
from farspan.storage.door import open_store

# What a user writes -> the kind of tier it means.
_KINDS = {"cpu": "dram", "cxl": "cxl", "nvme": "nvme"}
_SHARE_OF_HOST = 0.8
_ARENA = "KV arena"


class RunTiers:
    """The tiers one run opened; `wanted` are those of `memory.offload_activations`, which share the load."""

    def __init__(self, memory: MemoryConfig, device: torch.device, num_local: int) -> None:
        """`num_local`: processes of this host, which share its memory.

        Raises:
            ConfigError: no tier of the wanted kind is described.
            TierError: this machine does not have it.
        """
        self._all = open_tiers(memory.tiers, device, open_store)
        try:
            self.wanted = StripedTiers(self._of_kind(memory, device, num_local))
        except Exception:
            self.close()
            raise

    @property
    def all(self) -> Sequence[Tier]:
        """Every tier, wanted or not."""
        return [tier for tiers in self._all.values() for tier in tiers]

    def close(self) -> None:
        for tiers in self._all.values():
            for tier in tiers:
                tier.close()

    def _of_kind(self, memory: MemoryConfig, device: torch.device, num_local: int) -> list[Tier]:
        kind = _KINDS[memory.offload_activations]
        if kind == "dram" and kind not in self._all:
            capacity = int(_SHARE_OF_HOST * available_bytes() / num_local)
            self._all[kind] = [DramTier(capacity, device=device if device.type == "cuda" else None)]
        if kind not in self._all:
            raise ConfigError(
                "memory.tiers",
                f"must describe a tier of kind {kind} for memory.offload_activations={memory.offload_activations}",
                list(memory.tiers),
                f"add {'cxl:node=N:64GiB' if kind == 'cxl' else 'nvme:/folder:64GiB'} or use offload_activations=cpu",
            )
        return self._all[kind]


class RunOffload:
    """The offload of one run; `close` gives everything back."""

    def __init__(self, tiers: RunTiers, model: PreTrainedModel, device: torch.device) -> None:
        """`tiers` are closed with it."""
        self._tiers = tiers
        self._offload = ActivationOffload(tiers.wanted, trunk_and_head(model)[0], decoder_layers(model), device)

    @contextmanager
    def step(self, share: float = 1.0) -> Iterator[None]:
        """Around forward and backward of one sequence; `share` of its layers give away what they keep."""
        with self._offload.step(share):
            yield

    def swap(self, model: PreTrainedModel, share: float) -> None:
        """Recompute the layers of `model` but for a share of their tokens, whose products wait in the tier."""
        contexts = memo_contexts(self._offload, share)
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})

    @property
    def tiers(self) -> Sequence[Tier]:
        """Those of the run."""
        return self._tiers.all

    @property
    def report(self) -> OffloadReport:
        """What the last sequence of this rank moved."""
        return self._offload.report

    def close(self) -> None:
        self._offload.close()
        self._tiers.close()


class ArenaMemory:
    """Memory for the KV arena of one run in tiers that are computed on in place; `close` gives everything back."""

    def __init__(self, tiers: RunTiers) -> None:
        """`tiers` are closed with it."""
        self._tiers = tiers
        self._regions: dict[int, Region] = {}

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor whose content is undefined, for `KvArena(allocate)`.

        Raises:
            TierFullError: no tier has room.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        region = self._tiers.wanted.allocate(max(1, nbytes), _ARENA)
        tier = region.tier
        assert isinstance(tier, InPlaceTier), "the config was checked"
        tensor = tier.memory_of(region)[:nbytes].view(dtype).view(shape)
        self._regions[tensor.data_ptr()] = region
        return tensor

    def free(self, tensor: Tensor) -> None:
        """What `allocate` gave is not used any more."""
        region = self._regions.pop(tensor.data_ptr())
        region.tier.free(region)

    @property
    def tiers(self) -> Sequence[Tier]:
        """Those of the run."""
        return self._tiers.all

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(region.nbytes for region in self._regions.values())

    def close(self) -> None:
        while self._regions:
            region = self._regions.popitem()[1]
            region.tier.free(region)
        self._tiers.close()
