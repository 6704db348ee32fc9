"""AdamW whose moments take one byte each: bitsandbytes' block-wise kernels, on whole weights or on FSDP2 shards.

A block is 256 neighbouring values of a row: it has one scale, and each value one of 256 codes. Blocks never cross
rows, so a shard of rows holds whole blocks, and states are cut and joined like the weights themselves: the same codes
on any number of ranks. Weights whose rows are not whole blocks (norms, biases) keep fp32 moments, as do small ones.

Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization (https://arxiv.org/abs/2110.02861).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim.adamw import adamw

from farspan.errors import ConfigError
from farspan.optim.shards import like_shard, local_of

BLOCK = 256
_MIN_VALUES = 4096
_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW8bit(torch.optim.Optimizer):
    """States per weight: `step`, and per moment either `<moment>` (fp32) or `<moment>_codes` and `<moment>_scales`."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """
        Raises:
            ConfigError: a weight is fp64.
        """
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        # Signed for means, unsigned for squares, per device; the same for every weight and every step.
        self._maps: dict[torch.device, tuple[Tensor, Tensor]] = {}
        for weight in (p for group in self.param_groups for p in group["params"]):
            if weight.dtype is torch.float64:
                raise ConfigError(
                    "optim.kind", "adamw8bit needs weights of at most 32 bits", "float64", "use optim.kind=adamw"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            wide: list[nn.Parameter] = []
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    # Also on a rank that holds none of its rows: states are gathered by all ranks together.
                    self._start(weight)
                state["step"] += 1
                if local_of(weight).numel() == 0:
                    continue
                if f"{_MOMENTS[0]}_codes" in state:
                    self._step_blocks(weight, group)
                else:
                    wide.append(weight)
            self._step_wide(wide, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but codes stay codes: torch would cast them to the weights' type."""
        super().load_state_dict({**state_dict, "state": {}})
        restore_states(self, state_dict)

    def _start(self, weight: nn.Parameter) -> None:
        state = self.state[weight]
        state["step"] = torch.zeros(())
        local = local_of(weight)
        for moment in _MOMENTS:
            if not in_blocks(weight):
                state[moment] = like_shard(torch.zeros_like(local, dtype=torch.float32), weight)
                continue
            scales = torch.zeros(*local.shape[:-1], local.shape[-1] // BLOCK, device=local.device)
            state[f"{moment}_codes"] = like_shard(torch.zeros_like(local, dtype=torch.uint8), weight)
            state[f"{moment}_scales"] = like_shard(scales, weight)

    def _step_blocks(self, weight: nn.Parameter, group: dict[str, Any]) -> None:
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        state, local = self.state[weight], local_of(weight)
        assert weight.grad is not None
        signed, unsigned = self._maps_on(local.device)
        codes = [local_of(state[f"{moment}_codes"]) for moment in _MOMENTS]
        scales = [local_of(state[f"{moment}_scales"]).view(-1) for moment in _MOMENTS]
        beta1, beta2 = group["betas"]
        optimizer_update_8bit_blockwise(
            "adam", local_of(weight.grad).contiguous(), local, *codes, beta1, beta2, 0.0, 0.0, group["eps"],
            int(state["step"]), group["lr"], signed, unsigned, *scales, group["weight_decay"],
        )  # fmt: skip

    def _step_wide(self, weights: list[nn.Parameter], group: dict[str, Any]) -> None:
        if not weights:
            return
        states = [self.state[w] for w in weights]
        means, squares = ([local_of(s[moment]) for s in states] for moment in _MOMENTS)
        beta1, beta2 = group["betas"]
        adamw(
            [local_of(w) for w in weights],
            [local_of(w.grad) for w in weights if w.grad is not None],
            means,
            squares,
            [],
            # The functional form counts the step itself.
            [s["step"].sub_(1) for s in states],
            foreach=False,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _maps_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._maps:
            from bitsandbytes.functional import create_dynamic_map

            self._maps[device] = (
                create_dynamic_map(signed=True).to(device),
                create_dynamic_map(signed=False).to(device),
            )
        return self._maps[device]


def in_blocks(weight: Tensor) -> bool:
    """Whether a weight's moments are quantized: its rows are whole blocks, and it is cut by rows if at all."""
    by_rows = not isinstance(weight, DTensor) or all(not isinstance(p, Shard) or p.dim == 0 for p in weight.placements)
    return weight.ndim >= 2 and weight.shape[-1] % BLOCK == 0 and weight.numel() >= _MIN_VALUES and by_rows


def restore_states(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Put the states of a `state_dict` into the weights in the same places, each in its own type."""
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for index, weight in zip(saved, weights, strict=True):
        for key, value in state_dict["state"].get(index, {}).items():
            optimizer.state[weight][key] = value.clone()
