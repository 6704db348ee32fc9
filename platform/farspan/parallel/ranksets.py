"""Exchanges over any ranks of a run, made in no time: a set of ranks sends from rank to rank inside one group.

Shapes: R ranks of the set.

A process group for each set would have to be made by its members in one agreed order, costs buffers that are never
given back, and there are as many sets as plans ask for. One group of all ranks, made once and used for nothing else,
carries the messages of every set: two ranks find each other's in the order in which they were sent, and all ranks run
what they share in one order. Waits end at the deadline of that group.
Source: ByteScale (Ge et al. 2025, https://arxiv.org/abs/2502.21231) reuses its global group likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.parallel.exchange import Counter, Exchange, Transfer


@dataclass
class SetExchange(Exchange):
    """The ranks `members` of `group`, in that order. Only they call it."""

    members: tuple[int, ...] = field(kw_only=True)

    @property
    def rank(self) -> int:
        return self.members.index(dist.get_rank(self.group))

    @property
    def num_ranks(self) -> int:
        return len(self.members)

    def _member(self, number: int) -> int:
        return self.members[number % len(self.members)]

    def swap_rows(self, x: Tensor) -> Transfer:
        x = x.contiguous()
        out = torch.empty_like(x)
        transfer = self._each_to_each(list(x.unbind()), list(out.unbind()))
        return Transfer(transfer, (out,), (x,), self._waits)

    def gather(self, tensors: Sequence[Tensor]) -> Transfer:
        leaving = tuple(x.contiguous() for x in tensors)
        arriving = tuple(x.new_empty((self.num_ranks, *x.shape)) for x in leaving)
        works: list[dist.Work] = []
        for x, out in zip(leaving, arriving, strict=True):
            works += self._each_to_each([x] * self.num_ranks, list(out.unbind()))
        return Transfer(works, arriving, leaving, self._waits)

    def sum_rows(self, tensors: Sequence[Tensor]) -> Transfer:
        leaving = tuple(x.contiguous() for x in tensors)
        arriving = tuple(torch.empty_like(x) for x in leaving)
        works: list[dist.Work] = []
        for x, out in zip(leaving, arriving, strict=True):
            works += self._each_to_each(list(x.unbind()), list(out.unbind()))
        return _Summed(works, arriving, leaving, self._waits)

    def _each_to_each(self, rows: Sequence[Tensor], out: Sequence[Tensor]) -> list[dist.Work]:
        """Start sending rows[r] to member r; what it has for this one arrives in out[r]."""
        own = self.rank
        out[own].copy_(rows[own])
        others = [number for number in range(self.num_ranks) if number != own]
        sends = [dist.P2POp(dist.isend, rows[n], group=self.group, group_peer=self.members[n]) for n in others]
        receives = [dist.P2POp(dist.irecv, out[n], group=self.group, group_peer=self.members[n]) for n in others]
        self.counter.num_bytes += sum(rows[n].nbytes for n in others)
        return dist.batch_isend_irecv(sends + receives) if others else []


@dataclass(frozen=True)
class _Summed(Transfer):
    """Rows of every member that are one sum."""

    def wait(self) -> tuple[Tensor, ...]:
        return tuple(rows.sum(0) for rows in super().wait())


class RankSets:
    """Exchanges over sets of the ranks of the default group; collective to make, free to ask."""

    def __init__(self, device: torch.device, counter: Counter, *, timeout_s: float) -> None:
        """`counter` counts what this rank sends and waits in any set; `timeout_s` bounds every wait."""
        self.counter = counter
        self._group = dist.new_group(timeout=timedelta(seconds=timeout_s))
        # Some backends connect ranks in a group's first collective, which then all of them have to join.
        dist.all_reduce(torch.zeros(1, device=device), group=self._group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self._group)

    @property
    def num_ranks(self) -> int:
        return dist.get_world_size(self._group)

    def of(self, members: Sequence[int]) -> SetExchange:
        """The exchange of `members`, this rank among them."""
        assert self.rank in members, "a set is asked for by its members"
        return SetExchange(self._group, self.counter, members=tuple(members))
