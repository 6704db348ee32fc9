"""Weights cut by torch's FSDP2."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh

from farspan.config.schema import OptimConfig
from farspan.memory.inplace import InPlaceTier
from farspan.optim.host import HostOptimizer
from farspan.optim.make import clip_grad_norm, make_optimizer
from farspan.parallel.shard import shard_weights
from farspan.train.loss import PackedLoss
from farspan.train.states import gather_states, load_local_shards, local_shards, scatter_states, scatter_weights
from farspan.train.weights import weight_groups

_FROM_RANK_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


class Fsdp2Weights:
    """The `WeightsEngine` of torch: weights, gradients and states are DTensors cut over `mesh`."""

    def __init__(
        self,
        module: PackedLoss,
        layers: Iterable[nn.Module],
        mesh: DeviceMesh,
        compute_dtype: torch.dtype,
        optim: OptimConfig,
        offload_optimizer: str = "none",
        tier: InPlaceTier | None = None,
    ) -> None:
        """`tier`: where the optimizer lies with `offload_optimizer`; none: in a tier of its own."""
        shard_weights(module, layers, mesh, compute_dtype)
        self.module = module
        self.optimizer = make_optimizer(
            weight_groups(module, optim), optim, kind=optim.kind, offload=offload_optimizer, tier=tier
        )
        self._in_tier, self._max_grad_norm = tier is not None, optim.max_grad_norm

    def loss(self, *inputs: Any) -> Tensor:
        return cast(Tensor, self.module(*inputs))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> Tensor:
        norm = clip_grad_norm(self.optimizer, self._trained(), self._max_grad_norm)
        if torch.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def whole_weights(self, *, trained_only: bool) -> dict[str, Tensor]:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
        return cast("dict[str, Tensor]", get_model_state_dict(self.module, options=options))

    def whole_states(self) -> dict[str, Tensor]:
        return gather_states(self.module, self.optimizer)

    def load(self, weights: Mapping[str, Tensor], states: Mapping[str, Tensor], *, trained_only: bool) -> None:
        if trained_only:
            scatter_weights(self.module, weights)
        else:
            set_model_state_dict(self.module, dict(weights), options=_FROM_RANK_0)
        scatter_states(self.module, self.optimizer, states)

    def host_bytes(self) -> int:
        if not isinstance(self.optimizer, HostOptimizer):
            return 0
        return self.optimizer.bytes_beside() if self._in_tier else self.optimizer.host_bytes()

    def held(self) -> dict[str, Tensor]:
        return local_shards(self.module, self.optimizer)

    def put_back(self, held: Mapping[str, Tensor]) -> None:
        load_local_shards(self.module, self.optimizer, held)

    def close(self) -> None:
        if isinstance(self.optimizer, HostOptimizer):
            self.optimizer.close()

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]
