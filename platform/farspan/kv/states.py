"""The second kind of cache: one state of fixed size per sequence, for layers that carry a state along the tokens.

Shapes: S slots, B bytes of a slot. A slot holds every state of one sequence (all recurrent layers), contiguous, as a
page holds every layer. What transformers keeps in an object of its own (`kept`) is held beside the slot, and ends
with it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from farspan.errors import EngineError
from farspan.kv.pages import PagePool

# Every state begins at a multiple of this many bytes, whatever the types before it.
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class StateShape:
    """One state of one layer for one sequence."""

    layer: int
    kind: str
    """conv or recurrent: the two kinds transformers' cache layers have."""
    number: int
    """Which of the layer's states of that kind."""
    shape: tuple[int, ...]
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize


@dataclass(frozen=True, slots=True)
class StateLayout:
    """What one slot holds."""

    states: tuple[StateShape, ...] = ()
    counted_bytes: int = 0
    """Bytes of a sequence that lie in `kept`, and are only counted here."""

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each state begins in a slot, and the slot's end."""
        found = [0]
        for state in self.states:
            found.append(found[-1] + -(-state.num_bytes // _ALIGNMENT) * _ALIGNMENT)
        return tuple(found)

    @property
    def slot_bytes(self) -> int:
        return self.offsets[-1]

    @property
    def cost_bytes(self) -> int:
        """Bytes of memory that a held slot stands for."""
        return self.slot_bytes + self.counted_bytes

    def fingerprint(self) -> str:
        """Equal on two workers exactly when the bytes of a slot mean the same."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class StatePool:
    """A fixed number of slots, each free or held by exactly one sequence, which it knows by name."""

    def __init__(self, layout: StateLayout, num_slots: int, device: torch.device) -> None:
        self.layout = layout
        self.storage_SB = torch.zeros(num_slots, layout.slot_bytes, dtype=torch.uint8, device=device)
        self.epochs_S = torch.zeros(num_slots, dtype=torch.int64)
        self.kept: list[Any] = [None] * num_slots
        self._owners: dict[str, int] = {}
        self._free = list(range(num_slots - 1, -1, -1))
        self._views = [self._view(number) for number in range(len(layout.states))]

    @property
    def num_slots(self) -> int:
        return len(self.kept)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def states_S(self, number: int) -> Tensor:
        """[S, ...]: state `number` of the layout in every slot."""
        return self._views[number]

    def hold(self, owner: str) -> int:
        """The slot of `owner`; at the first call an empty one. There is one for every sequence that runs."""
        if owner not in self._owners:
            assert self._free, "more sequences run than there are states"
            slot = self._free.pop()
            # First the epoch, then the content, as for pages.
            self.epochs_S[slot] += 1
            self.storage_SB[slot] = 0
            self._owners[owner] = slot
        return self._owners[owner]

    def release(self, owner: str) -> None:
        """The owner's state is forgotten; one without a slot is no error."""
        slot = self._owners.pop(owner, None)
        if slot is not None:
            self.kept[slot] = None
            self._free.append(slot)

    def bytes_B(self, slot: int) -> Tensor:
        """View of everything in a slot."""
        return self.storage_SB[slot]

    def epoch(self, slot: int) -> int:
        return int(self.epochs_S[slot])

    def check_integrity(self, alive: Collection[str]) -> None:
        """Raises EngineError unless every slot is free or held by one of the sequences that are alive."""
        held = set(self._owners.values())
        if len(self._free) + len(held) != self.num_slots or held & set(self._free) or len(held) < len(self._owners):
            raise EngineError(
                f"states lost or doubly owned: {len(self._free)} free + {len(self._owners)} held is not "
                f"{self.num_slots}"
            )
        if dead := sorted(self._owners.keys() - set(alive)):
            raise EngineError(f"the state of {dead[0]} is held, but the sequence is over")
        if full := [slot for slot in self._free if self.kept[slot] is not None]:
            raise EngineError(f"state slot {full[0]} is free and holds a cache")

    def _view(self, number: int) -> Tensor:
        state, offset = self.layout.states[number], self.layout.offsets[number]
        size = state.torch_dtype.itemsize
        strides = [1]
        for extent in reversed(state.shape[1:]):
            strides.insert(0, strides[0] * extent)
        flat = self.storage_SB.view(-1).view(state.torch_dtype)
        row = self.layout.slot_bytes // size
        return flat.as_strided((self.num_slots, *state.shape), (row, *strides), offset // size)


def pack_state(state_B: Tensor, pool: PagePool, pages: Sequence[int]) -> None:
    """Put a state into held pages, where it has epochs and digests and travels as keys and values do."""
    content_NB = state_B.new_zeros(len(pages), pool.layout.page_bytes)
    content_NB.view(-1)[: len(state_B)] = state_B
    pool.storage_PB[list(pages)] = content_NB


def unpack_state(pool: PagePool, pages: Sequence[int]) -> Tensor:
    """Bytes of the state that was put into `pages`."""
    return pool.storage_PB[list(pages)].view(-1)[: pool.layout.state_bytes]
