"""Bytes that a program which is not ours hands to all-to-all, counted where torch dispatches its collectives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from farspan.errors import ClusterError

_c10d = torch.ops.c10d
# Which argument holds what is sent.
_ALL_TO_ALL = {_c10d.alltoall_.default: 1, _c10d.alltoall_base_.default: 1}
_SENDS_NOTHING = (_c10d.barrier.default,)


class WireBytes(TorchDispatchMode):
    """Inside, what this rank sends to others: of every all-to-all among `num_ranks` its equal parts but its own.

    Raises:
        ClusterError: another collective is called, whose bytes on the wire depend on how it is carried out.
    """

    def __init__(self, num_ranks: int) -> None:
        super().__init__()
        self._num_ranks = num_ranks
        self.bytes_sent = self.num_calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _ALL_TO_ALL:
            self._count(args[_ALL_TO_ALL[func]])
        elif func.namespace == "c10d" and func not in _SENDS_NOTHING:
            raise ClusterError(
                f"bytes on the wire are counted of all-to-all alone, and {func} was called; count it too"
            )
        return func(*args, **(kwargs or {}))

    def _count(self, sent: Tensor | list[Tensor]) -> None:
        self.num_calls += 1
        tensors = [sent] if isinstance(sent, Tensor) else sent
        total = sum(x.numel() * x.element_size() for x in tensors)
        self.bytes_sent += total * (self._num_ranks - 1) // self._num_ranks
