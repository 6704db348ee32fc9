"""What a step and a checkpoint ask of the engine that keeps weights, gradients and optimizer states.

Two engines answer: torch's FSDP2 (`fsdp2.py`) and DeepSpeed's ZeRO (`zero.py`). Both keep fp32 master weights, compute
in the run's compute type, sum gradients over every rank in fp32 and speak of weights by the names of the module, whole
and on rank 0: a checkpoint does not know which engine wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from farspan.config.schema import OptimConfig
from farspan.train.loss import PackedLoss


class WeightsEngine(Protocol):
    """Weights, gradients and AdamW's states of a `PackedLoss`, cut over every rank. Every call is collective."""

    module: PackedLoss

    def loss(self, *inputs: Any) -> Tensor:
        """`module(*inputs)`, with the weights it needs."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a loss to those of this step. `last`: no more will be added before `step`."""
        ...

    def step(self, lr: float) -> Tensor:
        """Clip, change the weights once and forget the gradients; gives the norm before clipping.

        A norm that is not finite leaves the weights and the optimizer's states as they were.
        """
        ...

    def whole_weights(self, *, trained_only: bool) -> dict[str, Tensor]:
        """Weight name -> whole tensor on the CPU of rank 0; other ranks get nothing."""
        ...

    def whole_states(self) -> dict[str, Tensor]:
        """`<weight>/<state>` -> whole tensor on the CPU of rank 0."""
        ...

    def load(self, weights: Mapping[str, Tensor], states: Mapping[str, Tensor], *, trained_only: bool) -> None:
        """Put back what `whole_weights` and `whole_states` gave; only rank 0 brings it."""
        ...

    def host_bytes(self) -> int:
        """What an offloaded optimizer of this rank holds in host memory beside the run's tiers; 0 without one.

        Weights and states, and gradients too where they are this project's to count (FSDP2). Not collective.
        """
        ...

    def held(self) -> dict[str, Tensor]:
        """What this rank holds between two steps, by name: its own tensors, not copies. Not collective.

        Empty where the engine cannot tell: then only a checkpoint can be gone on from.
        """
        ...

    def put_back(self, held: Mapping[str, Tensor]) -> None:
        """Take over what `held` gave on this rank of as many ranks. Not collective."""
        ...

    def close(self) -> None:
        """Give back memory of tiers; there are no more steps. Not collective."""
        ...


def weight_groups(module: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """The weights that are trained, as an optimizer takes them.

    Weight decay pulls matrices only: decaying norms and biases changes the model's scale for nothing.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
