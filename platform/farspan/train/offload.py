"""Where a run's activations wait between forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from farspan.activations.offload import ActivationOffload
from farspan.config.schema import MemoryConfig
from farspan.errors import ConfigError
from farspan.memory.host import DramTier
from farspan.memory.open import open_tiers
from farspan.memory.tier import Tier
from farspan.models.parts import decoder_layers, trunk_and_head
from farspan.storage.door import open_store

_KINDS = {"cpu": "dram", "cxl": "cxl", "nvme": "nvme"}
_SHARE_OF_HOST = 0.8


class RunOffload:
    """The offload of one run and the tiers it opened; `close` gives everything back."""

    def __init__(self, memory: MemoryConfig, model: PreTrainedModel, device: torch.device, num_local: int) -> None:
        """`num_local`: processes of this host, which share its memory.

        Raises:
            ConfigError: no tier of the wanted kind is described.
            TierError: this machine does not have it.
        """
        self._tiers = open_tiers(memory.tiers, device, open_store)
        try:
            tier = self._tier(memory, device, num_local)
            self._offload = ActivationOffload(tier, trunk_and_head(model)[0], decoder_layers(model), device)
        except Exception:
            self.close()
            raise

    @contextmanager
    def step(self, share: float = 1.0) -> Iterator[None]:
        """Around forward and backward of one sequence; `share` of its layers give away what they keep."""
        with self._offload.step(share):
            yield

    @property
    def stored_bytes(self) -> int:
        """Bytes that left in the last step of this rank."""
        return self._offload.report.stored_bytes

    @property
    def waited_s(self) -> float:
        """Seconds the last step waited for bytes to come back."""
        return self._offload.report.waited_s

    def close(self) -> None:
        if hasattr(self, "_offload"):
            self._offload.close()
        for tiers in self._tiers.values():
            for tier in tiers:
                tier.close()

    def _tier(self, memory: MemoryConfig, device: torch.device, num_local: int) -> Tier:
        kind = _KINDS[memory.offload_activations]
        if kind == "dram" and kind not in self._tiers:
            capacity = int(_SHARE_OF_HOST * available_bytes() / num_local)
            self._tiers[kind] = [DramTier(capacity, device=device if device.type == "cuda" else None)]
        if kind not in self._tiers:
            raise ConfigError(
                "memory.tiers",
                f"must describe a tier of kind {kind} for memory.offload_activations={memory.offload_activations}",
                list(memory.tiers),
                f"add {'cxl:node=N:64GiB' if kind == 'cxl' else 'nvme:/folder:64GiB'} or use offload_activations=cpu",
            )
        return self._tiers[kind][0]


def available_bytes() -> int:
    """Memory of this host that nobody uses, as the kernel estimates it."""
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel tells no MemAvailable")
