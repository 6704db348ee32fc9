"""Ranks that run one model together: what they add up, and what the first of them, the leader, tells the others.

Only plain tensors travel. Whoever waits for another waits at most `deadline_s`, which the groups were made with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from farspan.errors import EngineError, ModelError

# Numbers of a message that travel at once: most are this short.
_FRAME = 512
_LEADER = 0


class Word(IntEnum):
    """What a leader says."""

    END = 0
    BEAT = 1
    """Answer that you are there."""
    RUN = 2
    """Compute these pieces."""
    ADDRESS = 3
    """Open your transport, and tell where others reach it."""
    DIGEST = 4
    """Tell the digests of these pages."""
    FETCH = 5
    """Begin to read these pages of another worker's rank."""
    POLL = 6
    """Tell how these fetches stand."""


@dataclass(frozen=True, slots=True)
class Gang:
    """One rank's view of all of them."""

    control: dist.ProcessGroup
    """Takes tensors of the CPU."""
    compute: dist.ProcessGroup
    """Takes tensors of the model's device; may be the same."""
    deadline_s: float
    """Timeout of both groups: said where it passed."""

    @property
    def rank(self) -> int:
        return dist.get_rank(self.control)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.control)

    @property
    def leads(self) -> bool:
        return self.rank == _LEADER

    def sum(self, x: Tensor) -> Tensor:
        """`x`, overwritten by the sum of every rank's."""
        self._with_others(lambda: dist.all_reduce(x, group=self.compute))
        return x

    def join(self, columns_TV: Tensor) -> Tensor:
        """On the leader the columns of all ranks side by side, elsewhere one's own."""
        mine = columns_TV.contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)] if self.leads else None
        self._with_others(lambda: dist.gather(mine, parts, group=self.compute, group_dst=_LEADER))
        return columns_TV if parts is None else torch.cat(parts, -1)

    def tell(self, word: Word, numbers: np.ndarray | None = None) -> None:
        """The leader's message to all others: a word and int64 numbers."""
        values = torch.from_numpy(np.zeros(0, np.int64) if numbers is None else numbers)
        frame = torch.zeros(_FRAME, dtype=torch.int64)
        frame[0], frame[1] = int(word), len(values)
        first, rest = values[: _FRAME - 2], values[_FRAME - 2 :].contiguous()
        frame[2 : 2 + len(first)] = first
        self._from_leader(frame)
        if len(rest):
            self._from_leader(rest)

    def hear(self) -> tuple[Word, np.ndarray]:
        """What the leader tells next."""
        frame = torch.zeros(_FRAME, dtype=torch.int64)
        self._from_leader(frame)
        count = int(frame[1])
        rest = torch.zeros(max(0, count - (_FRAME - 2)), dtype=torch.int64)
        if len(rest):
            self._from_leader(rest)
        return Word(int(frame[0])), torch.cat([frame[2 : min(2 + count, _FRAME)], rest]).numpy()

    def collect(self, numbers: np.ndarray) -> list[np.ndarray]:
        """On the leader the int64 numbers of every rank, as many of each; elsewhere nothing."""
        # One more, so that ranks meet also where there is nothing to tell.
        mine = torch.from_numpy(np.concatenate([np.zeros(1, np.int64), numbers]))
        parts = [torch.empty_like(mine) for _ in range(self.size)] if self.leads else None
        self._with_others(lambda: dist.gather(mine, parts, group=self.control, group_dst=_LEADER))
        return [part[1:].numpy() for part in parts or []]

    def leaders(self, number: float) -> float:
        """The leader's number, on every rank."""
        number_1 = torch.tensor([number], dtype=torch.float64)
        self._from_leader(number_1)
        return float(number_1)

    def agree(self, digest: bytes) -> None:
        """Raises ModelError where a rank has another digest than the leader."""
        mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        self._with_others(lambda: dist.all_gather(parts, mine, group=self.control))
        other = [rank for rank, part in enumerate(parts) if not torch.equal(part, parts[_LEADER])]
        if other:
            raise ModelError(f"rank {other[0]} has another model, layout or memory than rank 0; start all ranks alike")

    def _from_leader(self, x: Tensor) -> None:
        self._with_others(lambda: dist.broadcast(x, group=self.control, group_src=_LEADER))

    def _with_others(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as problem:
            # Gloo and NCCL say so when a connection ends, and when the deadline has passed.
            reason = " ".join(str(problem).split())[:200]
            raise EngineError(
                f"rank {self.rank} of {self.size}: another rank is lost, or was silent for {self.deadline_s:g} s "
                f"({reason})"
            ) from None
