"""The only place where ranks of one sequence talk: differentiable collectives that count what they send.

Shapes: R ranks. The process group is passed in; nothing here is process-wide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Exchange:
    """One group of ranks that share a sequence.

    `bytes_sent` counts what this rank sent to the others, backward included.
    """

    group: dist.ProcessGroup
    bytes_sent: int = 0

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def num_ranks(self) -> int:
        return dist.get_world_size(self.group)

    def all_to_all(self, x: Tensor) -> Tensor:
        """Row r of `x` [R, ...] goes to rank r; row r of the result came from rank r. Its own transpose in backward."""
        if self.num_ranks == 1:
            return x
        return cast(Tensor, _AllToAll.apply(x, self))

    def swap_rows(self, x: Tensor) -> Tensor:
        """The collective itself, outside autograd."""
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=self.group)
        self.bytes_sent += x.numel() * x.element_size() * (self.num_ranks - 1) // self.num_ranks
        return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.swap_rows(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.swap_rows(grads[0]), None
