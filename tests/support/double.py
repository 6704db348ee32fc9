"""Compute in double precision what transformers computes in single precision on purpose.

Many models take softmax, norms and recurrences to fp32, whatever the type of their weights: two correct ways to
compute them then differ by 1e-7, and a wrong one by little more. Inside this mode fp32 means fp64, for the model as
for whoever is compared with it, and differences that are left are mistakes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class DoublePrecision(TorchFunctionMode):
    """A context in which every request for torch.float32 gets torch.float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        given = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **given)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
