"""The only place where ranks of one sequence talk: collectives that count what they send, and how long they keep.

Shapes: R ranks. The process group is passed in; nothing here is process-wide.
Waits end: every operation carries the deadline its process group was made with.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.parallel.waits import Waits

# torch 2.13 renamed both and warns about the old names; these two lines go when 2.13 is the oldest torch we run on.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Counter:
    """Bytes sent to other ranks, and time waited for theirs. Exchanges of one sequence may share one."""

    num_bytes: int = 0
    waits: Waits = field(default_factory=Waits)


@dataclass(frozen=True)
class Transfer:
    """Tensors on their way. Both ends stay alive here, and unchanged, until `wait`."""

    works: Sequence[dist.Work]
    arriving: tuple[Tensor, ...]
    leaving: tuple[Tensor, ...]
    waits: Waits | None = None
    """Where the wait is counted; none: nowhere."""

    def wait(self) -> tuple[Tensor, ...]:
        """What arrived."""
        with nullcontext() if self.waits is None else self.waits.on(self.arriving[0].device):
            for work in self.works:
                work.wait()
        return self.arriving


@dataclass
class Exchange:
    """One group of ranks that share a sequence.

    `bytes_sent` counts what this rank sent to the others, backward included; of a collective it counts what a rank
    must give away at least (an all-gather: its own part to each of the others).
    """

    group: dist.ProcessGroup
    counter: Counter = field(default_factory=Counter)

    @property
    def bytes_sent(self) -> int:
        return self.counter.num_bytes

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def num_ranks(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def _waits(self) -> Waits | None:
        """A rank that is alone waits for nobody."""
        return self.counter.waits if self.num_ranks > 1 else None

    def _member(self, number: int) -> int:
        """The rank of the group that is member `number` of the exchange, counted round."""
        return number % self.num_ranks

    def all_to_all(self, x: Tensor) -> Tensor:
        """Row r of `x` [R, ...] goes to rank r; row r of the result came from rank r. Its own transpose in backward."""
        return self.swap(x).wait()

    def swap(self, x: Tensor) -> Swap:
        """The same, started only: what is computed before `wait` hides it, in forward and again in backward."""
        if self.num_ranks == 1:
            return Swap(x, None)
        journey = _Journey(self)
        return Swap(cast(Tensor, _Depart.apply(x, journey)), journey)

    def swap_rows(self, x: Tensor) -> Transfer:
        """The collective itself, outside autograd."""
        x = x.contiguous()
        out = torch.empty_like(x)
        work = dist.all_to_all_single(out, x, group=self.group, async_op=True)
        self.counter.num_bytes += x.nbytes * (self.num_ranks - 1) // self.num_ranks
        return Transfer([work], (out,), (x,), self._waits)

    def pass_on(self, tensors: Sequence[Tensor], distance: int = 1) -> Transfer:
        """Start sending `tensors` to the rank `distance` further on; as many of the same shapes arrive from behind.

        Every rank passes on at the same time by the same distance: what two ranks send each other stays in order.
        """
        num_ranks, leaving = self.num_ranks, tuple(x.contiguous() for x in tensors)
        if distance % num_ranks == 0:
            return Transfer((), leaving, ())
        arriving = tuple(torch.empty_like(x) for x in leaving)
        ahead, behind = (self._member(self.rank + step) for step in (distance, -distance))
        sends = [dist.P2POp(dist.isend, x, group=self.group, group_peer=ahead) for x in leaving]
        receives = [dist.P2POp(dist.irecv, x, group=self.group, group_peer=behind) for x in arriving]
        works = dist.batch_isend_irecv(sends + receives)
        self.counter.num_bytes += sum(x.nbytes for x in leaving)
        return Transfer(works, arriving, leaving, self._waits)

    def gather(self, tensors: Sequence[Tensor]) -> Transfer:
        """Start collecting `tensors` of every rank: [R, *shape] each, row r from rank r."""
        leaving = tuple(x.contiguous() for x in tensors)
        arriving = tuple(x.new_empty((self.num_ranks, *x.shape)) for x in leaving)
        works = [
            _all_gather(out.flatten(0, 1), x, group=self.group, async_op=True)
            for out, x in zip(arriving, leaving, strict=True)
        ]
        self.counter.num_bytes += sum(x.nbytes for x in leaving) * (self.num_ranks - 1)
        return Transfer([work for work in works if work is not None], arriving, leaving, self._waits)

    def sum_rows(self, tensors: Sequence[Tensor]) -> Transfer:
        """Start summing `tensors` [R, ...] over ranks, row r of the sums arriving at rank r (a reduce-scatter)."""
        leaving = tuple(x.contiguous() for x in tensors)
        arriving = tuple(torch.empty_like(x[0]) for x in leaving)
        works = [
            _reduce_scatter(out, x.flatten(0, 1), group=self.group, async_op=True)
            for out, x in zip(arriving, leaving, strict=True)
        ]
        self.counter.num_bytes += sum(x.nbytes for x in leaving) * (self.num_ranks - 1) // self.num_ranks
        return Transfer([work for work in works if work is not None], arriving, leaving, self._waits)


@dataclass
class _Journey:
    """One differentiable swap: the transfer under way, first of the values, in backward of their gradients."""

    exchange: Exchange
    transfer: Transfer | None = None

    def depart(self, x: Tensor) -> Tensor:
        assert self.transfer is None, "a swap is waited for before it starts again"
        self.transfer = self.exchange.swap_rows(x)
        return self.transfer.arriving[0]

    def arrive(self) -> None:
        assert self.transfer is not None, "a swap is started before it is waited for"
        self.transfer.wait()
        self.transfer = None


@dataclass(frozen=True)
class Swap:
    """A tensor on its way, not to be looked at before `wait`."""

    arriving: Tensor
    journey: _Journey | None

    def wait(self) -> Tensor:
        """What arrived."""
        return self.arriving if self.journey is None else cast(Tensor, _Arrive.apply(self.arriving, self.journey))


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        return journey.depart(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.journey.arrive()
        return grads[0], None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        journey.arrive()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Autograd runs later nodes first: other stages' backward is computed before _Depart's waits for this.
        return ctx.journey.depart(grads[0]), None
