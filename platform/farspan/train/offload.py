"""Where a run's activations wait between forward and backward, and where the KV arena of a run by chunks lies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from farspan.activations.memo_tokens import memo_contexts
from farspan.activations.offload import ActivationOffload, OffloadReport
from farspan.memory.inplace import InPlaceTier
from farspan.memory.striped import StripedTiers
from farspan.memory.tier import Region, Tier
from farspan.models.parts import decoder_layers, trunk_and_head
from farspan.plan.tiers import ACTIVATIONS, ARENA, ARENA_GRADIENTS, OPTIMIZER, Given


class RunTiers:
    """The tiers one run opened, and what of it lies in which, as `farspan.plan.tiers` decided."""

    def __init__(self, tiers: Mapping[str, Tier], given: Sequence[Given]) -> None:
        """`tiers` by the names that decisions call them; they are closed with it."""
        self._tiers, self.given = tiers, {one.kind.name: one for one in given}

    def of(self, name: str) -> StripedTiers:
        """Where one kind of bytes goes: over the tiers it was given, in its shares.

        What was predicted a little too small overflows into the others that may hold it.
        """
        given = self.given[name]
        allowed = {
            key: tier for key, tier in self._tiers.items() if not given.kind.only or tier.kind in given.kind.only
        }
        if not given.shares:
            return StripedTiers(list(allowed.values()))
        shares = dict(given.shares)
        after = [tier for key, tier in allowed.items() if key not in shares and tier.kind != "device"]
        return StripedTiers([self._tiers[key] for key in shares], list(shares.values()), after)

    @property
    def optimizer(self) -> InPlaceTier | None:
        """Where the optimizer lies, in one piece; none: on the device."""
        if OPTIMIZER not in self.given:
            return None
        (tier,) = self.of(OPTIMIZER).tiers
        assert isinstance(tier, InPlaceTier), "it is given DRAM or CXL memory alone"
        return tier

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for each kind of bytes: where it lies and why, and what may not fit."""
        lines = []
        for name, given in self.given.items():
            lines.append(f"{name}: {given.text()}")
            if given.refused is not None and given.shares:
                lines.append(f"{name}: {given.refused}")
        return tuple(lines)

    @property
    def all(self) -> Sequence[Tier]:
        """Every tier, whatever lies there."""
        return tuple(self._tiers.values())

    def close(self) -> None:
        for tier in self._tiers.values():
            tier.close()


class RunOffload:
    """The offload of one run; `close` gives its buffers back."""

    def __init__(self, tiers: RunTiers, model: PreTrainedModel, device: torch.device) -> None:
        home = tiers.of(ACTIVATIONS)
        self._offload = ActivationOffload(home, trunk_and_head(model)[0], decoder_layers(model), device)

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
    def report(self) -> OffloadReport:
        """What the last sequence of this rank moved."""
        return self._offload.report

    def close(self) -> None:
        self._offload.close()


class ArenaMemory:
    """Memory for the KV arena of one run in tiers that are computed on in place; `close` gives everything back."""

    def __init__(self, tiers: RunTiers) -> None:
        self._keys, self._sums = tiers.of(ARENA), tiers.of(ARENA_GRADIENTS)
        self._regions: dict[int, Region] = {}

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor whose content is undefined, for the keys and values of `KvArena`.

        Raises:
            TierFullError: no tier has room.
        """
        return self._take(self._keys, ARENA, shape, dtype)

    def allocate_sums(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The same, for the sums of gradients, which the processor adds to."""
        return self._take(self._sums, ARENA_GRADIENTS, shape, dtype)

    def free(self, tensor: Tensor) -> None:
        """What was given is not used any more."""
        region = self._regions.pop(tensor.data_ptr())
        region.tier.free(region)

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(region.nbytes for region in self._regions.values())

    def close(self) -> None:
        while self._regions:
            region = self._regions.popitem()[1]
            region.tier.free(region)

    def _take(self, home: StripedTiers, owner: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        region = home.allocate(max(1, nbytes), owner)
        tier = region.tier
        assert isinstance(tier, InPlaceTier), "the config was checked"
        tensor = tier.memory_of(region)[:nbytes].view(dtype).view(shape)
        self._regions[tensor.data_ptr()] = region
        return tensor
