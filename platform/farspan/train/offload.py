"""Where a run's activations wait between forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from farspan.activations.memo_tokens import memo_contexts
from farspan.activations.offload import ActivationOffload, OffloadReport
from farspan.activations.offload_choose import choose_offload
from farspan.config.schema import MemoryConfig
from farspan.memory.host import DramTier
from farspan.memory.open import open_tiers
from farspan.models.parts import decoder_layers, trunk_and_head
from farspan.storage.door import open_store

_SHARE_OF_HOST = 0.8


class RunOffload:
    """The offload of one run and the tiers it opened; `close` gives everything back."""

    def __init__(self, memory: MemoryConfig, model: PreTrainedModel, device: torch.device, num_local: int) -> None:
        """`num_local`: processes of this host, which share its memory.

        Raises:
            ConfigError: no tier of the wanted kind is described.
            TierError: this machine does not have it.
        """
        self._offload: ActivationOffload | None = None
        self._tiers = open_tiers(memory.tiers, device, open_store)
        where, trunk = memory.offload_activations, trunk_and_head(model)[0]
        if where == "cpu" and "dram" not in self._tiers:
            capacity = int(_SHARE_OF_HOST * available_bytes() / num_local)
            self._tiers["dram"] = [DramTier(capacity, device=device if device.type == "cuda" else None)]
        try:
            self._offload = choose_offload(where, self._tiers, trunk, decoder_layers(model), device)
        except Exception:
            self.close()
            raise

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around forward and backward of one sequence."""
        assert self._offload is not None, "a run without offload has no RunOffload"
        with self._offload.step():
            yield

    def swap(self, model: PreTrainedModel, share: float) -> None:
        """Recompute the layers of `model` but for a share of their tokens, whose products wait in the tier."""
        assert self._offload is not None, "a run without offload has no RunOffload"
        contexts = memo_contexts(self._offload, share)
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})

    @property
    def report(self) -> OffloadReport:
        """What the last sequence of this rank moved."""
        assert self._offload is not None, "a run without offload has no RunOffload"
        return self._offload.report

    def close(self) -> None:
        if self._offload is not None:
            self._offload.close()
        for tiers in self._tiers.values():
            for tier in tiers:
                tier.close()


def available_bytes() -> int:
    """Memory of this host that nobody uses, as the kernel estimates it."""
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel tells no MemAvailable")
