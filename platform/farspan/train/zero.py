"""Weights cut by DeepSpeed's ZeRO: optimizer states (1), gradients too (2), weights too (3), states in host memory.

DeepSpeed divides summed gradients by the number of ranks; the loss is multiplied by it before backward, because it is
already divided by the labels of all ranks. (Its own `gradient_allreduce_op: sum` does not exist for stage 3.)
Source: https://www.deepspeed.ai/docs/config-json/
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from farspan.config.schema import OptimConfig, WeightsConfig
from farspan.errors import ConfigError, TrainingError
from farspan.parallel.mesh import Mesh
from farspan.train.loss import PackedLoss
from farspan.train.weights import weight_groups

_MOMENTS = ("exp_avg", "exp_avg_sq")


def refuse_without_deepspeed() -> None:
    """Refuse `weights.engine=deepspeed` where it cannot run.

    Raises:
        ConfigError: it is not installed, or the launcher did not say which device is this process's.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "weights.engine",
            "needs the package deepspeed, which is not installed",
            "deepspeed",
            "run `pip install 'farspan[deepspeed]'` or use weights.engine=fsdp2",
        )
    if "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            "weights.engine",
            "needs a launcher that sets LOCAL_RANK, as Ray Train and torchrun do",
            "deepspeed",
            "start the run with `farspan train`, or use weights.engine=fsdp2",
        )


class ZeroWeights:
    """The `WeightsEngine` of DeepSpeed."""

    def __init__(
        self,
        module: PackedLoss,
        mesh: Mesh,
        compute_dtype: torch.dtype,
        optim: OptimConfig,
        weights: WeightsConfig,
        tiled: Iterable[nn.Module] = (),
    ) -> None:
        """`tiled` are modules that are run by tiles: each gathers all its weights at once."""
        _start_deepspeed(mesh)
        import deepspeed

        for mlp in tiled:
            deepspeed.utils.set_z3_leaf_module(mlp, True)
        self.module = module
        self._group = mesh.all.get_group()
        self._stage = weights.zero
        self._offloads = weights.offload_optimizer == "cpu"
        betas = (optim.beta1, optim.beta2)
        self._adamw = torch.optim.AdamW(weight_groups(module, optim), lr=optim.lr, betas=betas)
        # DeepSpeed casts weights to the compute type before it copies its fp32 ones from them.
        masters = {name: p.data for name, p in module.named_parameters() if p.requires_grad}
        with warnings.catch_warnings(action="ignore"):
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=self._adamw,
                config=zero_config(module, compute_dtype, optim, weights),
                mpu=_OneAxis(self._group),
                dist_init_required=False,
            )
        self._make_states()
        if compute_dtype == torch.bfloat16:
            self._set_weights(masters, self._trained())

    def loss(self, *inputs: Any) -> Tensor:
        return cast(Tensor, self._engine(*inputs))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * dist.get_world_size(self._group), scale_wrt_gas=False)

    def step(self, lr: float) -> Tensor:
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._engine.step()
        if not self._engine.was_step_applied():
            return torch.tensor(float("inf"))
        return torch.as_tensor(self._engine.get_global_grad_norm())

    def whole_weights(self, *, trained_only: bool) -> dict[str, Tensor]:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        whole: dict[str, Tensor] = {}
        for name, weight in self.module.named_parameters():
            if weight.requires_grad:
                self._keep(whole, name, safe_get_full_fp32_param(weight))
            elif not trained_only:
                with GatheredParameters([weight]):
                    self._keep(whole, name, weight)
        if not trained_only:
            for name, buffer in self._saved_buffers():
                self._keep(whole, name, buffer)
        return whole

    def whole_states(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        whole: dict[str, Tensor] = {}
        step = next(iter(self._adamw.state.values()))["step"]
        for name, weight in self._trained():
            self._keep(whole, f"{name}/step", step)
            for key in _MOMENTS:
                self._keep(whole, f"{name}/{key}", safe_get_full_optimizer_state(weight, key))
        return whole

    def load(self, weights: Mapping[str, Tensor], states: Mapping[str, Tensor], *, trained_only: bool) -> None:
        self._set_weights(weights, self._trained() if trained_only else self.module.named_parameters())
        if not trained_only:
            for name, buffer in self._saved_buffers():
                buffer.copy_(self._from_rank_0(weights.get(name), buffer.shape, buffer.dtype))
        self._set_states(states)

    def host_bytes(self) -> int:
        if not self._offloads:
            return 0
        states = (value for flat in self._masters() for value in self._adamw.state[flat].values())
        return sum(tensor.nbytes for tensor in (*self._masters(), *states))

    def held(self) -> dict[str, Tensor]:
        return {}

    def put_back(self, held: Mapping[str, Tensor]) -> None:
        raise AssertionError("nothing was held")

    def close(self) -> None:
        # DeepSpeed's host memory is its own.
        return None

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    def _saved_buffers(self) -> list[tuple[str, Tensor]]:
        saved = self.module.state_dict(keep_vars=True).keys()
        return [(name, buffer) for name, buffer in self.module.named_buffers() if name in saved]

    def _keep(self, whole: dict[str, Tensor], name: str, tensor: Tensor) -> None:
        if dist.get_rank() == 0:
            # A copy: what is written later must not change with the next step.
            whole[name] = tensor.detach().to("cpu", copy=True)

    @torch.no_grad()
    def _set_weights(self, weights: Mapping[str, Tensor], named: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Compute weights and fp32 masters, one at a time."""
        from deepspeed.runtime.zero import GatheredParameters

        for name, weight in named:
            full = self._from_rank_0(weights.get(name), getattr(weight, "ds_shape", weight.shape), torch.float32)
            with GatheredParameters([weight], modifier_rank=0, enabled=self._stage == 3):
                weight.data.copy_(full)
            if weight.requires_grad:
                self._set_fp32(weight, full, None)

    def _set_states(self, states: Mapping[str, Tensor]) -> None:
        step: list[Any] = [next((value.item() for name, value in states.items() if name.endswith("/step")), 0.0)]
        dist.broadcast_object_list(step, src=0)
        for state in self._adamw.state.values():
            state["step"].fill_(step[0])
        for name, weight in self._trained():
            for key in _MOMENTS:
                shape = getattr(weight, "ds_shape", weight.shape)
                self._set_fp32(weight, self._from_rank_0(states.get(f"{name}/{key}"), shape, torch.float32), key)

    def _make_states(self) -> None:
        """AdamW's states as they are before its first step.

        Left to itself, stage 1 and 2 of DeepSpeed 0.19 link states to weights after the first parameter group's first
        step, when those of the next group do not exist yet, and never again.
        """
        for flat in self._masters():
            moments = {key: torch.zeros_like(flat, requires_grad=False) for key in _MOMENTS}
            self._adamw.state[flat] = {"step": torch.zeros(()), **moments}
        if self._stage < 3:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _masters(self) -> list[Tensor]:
        """The flat fp32 weights that this rank steps."""
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self._adamw.param_groups for p in group["params"]]

    def _set_fp32(self, weight: nn.Parameter, full: Tensor, key: str | None) -> None:
        """Put a whole fp32 weight (or its state `key`) into the parts this rank keeps."""
        from deepspeed import utils

        whole = self._stage < 3
        part = full if whole else self._part(weight, full)
        if key is None:
            (utils.safe_set_full_fp32_param if whole else utils.safe_set_local_fp32_param)(weight, part)
        else:
            setter = utils.safe_set_full_optimizer_state if whole else utils.safe_set_local_optimizer_state
            setter(weight, part, key)

    def _part(self, weight: Any, full: Tensor) -> Tensor:
        """This rank's equal part of a weight of stage 3; the last ones are padded with zeros."""
        numel = weight.ds_tensor.numel()
        padded = full.new_zeros(numel * dist.get_world_size(self._group))
        padded[: full.numel()] = full.flatten()
        return padded.narrow(0, numel * dist.get_rank(self._group), numel)

    def _from_rank_0(self, tensor: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        full = torch.empty(shape, dtype=dtype, device=self._engine.device)
        if dist.get_rank() == 0:
            assert tensor is not None, "rank 0 brings every tensor"
            full.copy_(tensor)
        dist.broadcast(full, src=0, group=self._group)
        return full


def zero_config(
    module: nn.Module, compute_dtype: torch.dtype, optim: OptimConfig, weights: WeightsConfig
) -> dict[str, Any]:
    """DeepSpeed's config of a run; accumulation and the learning rate stay with the caller."""
    vectors = [p.numel() for p in module.parameters() if p.ndim < 2]
    zero: dict[str, Any] = {
        "stage": weights.zero,
        # Matrices are cut, vectors (norms, biases) stay whole: gathering them would only cost time.
        "stage3_param_persistence_threshold": max(vectors, default=0),
    }
    if weights.offload_optimizer == "cpu":
        pinned = next(module.parameters()).device.type == "cuda"
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's AdamW updates states in host memory too; DeepSpeed's own would be compiled on every machine.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": compute_dtype == torch.bfloat16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }


class _OneAxis:
    """What DeepSpeed asks a launcher about its axes: every rank of the run is data parallel, nothing else.

    With it DeepSpeed uses the run's group, which has a deadline, instead of making one that has none.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._all = group
        self._alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._all

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._all)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._all)

    def get_model_parallel_group(self) -> Any:
        return self._alone

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1


def _start_deepspeed(mesh: Mesh) -> None:
    """Let DeepSpeed take over the process groups that exist.

    Raises:
        TrainingError: it did not start on some rank; without a GPU it compiles an extension first.
    """
    problem = None
    try:
        with warnings.catch_warnings(action="ignore"):
            import deepspeed

            logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
            deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
            kind = deepspeed.get_accelerator().device_name()
            if kind != mesh.all.device_type:
                problem = f"it computes on {kind}, the run on {mesh.all.device_type}; set DS_ACCELERATOR"
    except Exception as found:
        problem = f"{type(found).__name__}: {' '.join(str(found).split())}; on CPUs it needs g++ and ninja"
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    broken = [p for p in problems if p is not None]
    if broken:
        raise TrainingError(f"DeepSpeed did not start: {broken[0]}; or use weights.engine=fsdp2")
