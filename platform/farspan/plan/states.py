"""Bytes of weights, gradients and optimizer states on one rank. Torch-free, pure.

Compute type of two bytes (bf16), master weights and sums of gradients in fp32, AdamW's two moments in fp32 or in 8 bits
with one fp32 scale for each 256 numbers.

| engine | weights | gradients | moments | offload_optimizer=cpu |
|---|---|---|---|---|
| fsdp2 | 4 / R | 4 / R | 8 / R | weights stay; a copy and the moments in host memory; gradients leave by layers |
| deepspeed 1 | 2 | 2 | 12 / R with the master | 12 / R in host memory |
| deepspeed 2 | 2 | 2 / R | 12 / R | the same, gradients leave |
| deepspeed 3 | 2 / R | 2 / R | 12 / R | the same, gradients leave |

(bytes of one parameter on R ranks). With LoRA the frozen weights are 2 / R, or 2 where the engine does not shard them,
and only the adapters have the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from farspan.plan.choice import Choice
from farspan.plan.profile import ModelProfile

_NARROW, _WIDE = 2, 4
_SCALE_GROUP = 256
# DeepSpeed reduces gradients in two buckets of this many numbers.
_BUCKET_NUMBERS = 5e8


@dataclass(frozen=True, slots=True)
class States:
    """What exists during the whole step, and what a layer needs of weights while it runs; bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float
    host: float
    gathered: float
    """Whole weights in the compute type: the layer that runs, the next one, and the root's (embedding, head)."""
    root_gradients: float
    """Whole gradients of the root, which wait for the end of backward."""
    layer_gradients: float
    """Whole gradients of a layer and their sums over ranks on the way."""
    buckets: float
    step_scratch: float
    """What the optimizer step needs for a moment."""

    @property
    def fixed(self) -> float:
        """Held during the whole step."""
        return self.weights + self.gradients + self.optimizer + self.buckets


def states_of(profile: ModelProfile, choice: Choice) -> States:
    """The states of `choice`, by the table above."""
    ranks, whole = choice.num_ranks, float(profile.num_parameters)
    trained = float(choice.lora_rank * profile.lora_width) if choice.lora_rank else whole
    frozen = whole if choice.lora_rank else 0.0
    moments = (2 * 1 + 2 * _WIDE / _SCALE_GROUP if choice.optimizer == "adamw8bit" else 2 * _WIDE) * trained / ranks
    offloaded = choice.offload_optimizer != "none"
    master = _WIDE * trained / ranks
    narrow_share = 1 / ranks if choice.shards_weights else 1.0
    if choice.engine == "fsdp2":
        weights = master + _NARROW * frozen / ranks
        gradients = 0.0 if offloaded else _WIDE * trained / ranks
        optimizer = 0.0 if offloaded else moments
    else:
        weights = _NARROW * (trained + frozen) * narrow_share
        whole_gradients = choice.zero == 1
        gradients = _NARROW * trained * (1.0 if whole_gradients else 0.0 if offloaded else 1 / ranks)
        optimizer = 0.0 if offloaded else master + moments
    # Gradients land beside the states they change; those of a second pass wait to be added (fsdp2).
    landing = _WIDE * (2 if choice.engine == "fsdp2" and choice.chunk != "none" else 1) * trained / ranks
    layer = max(kind.num_parameters for kind in profile.kinds)
    layer_trained = layer * trained / whole
    root_trained = 0.0 if choice.lora_rank else float(profile.root_parameters)
    fsdp = choice.engine == "fsdp2"
    return States(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        host=master + moments + landing if offloaded else 0.0,
        gathered=_NARROW * (2.0 * layer + profile.root_parameters) if choice.shards_weights else 0.0,
        root_gradients=_NARROW * root_trained if fsdp else 0.0,
        layer_gradients=(_NARROW + _WIDE) * layer_trained if fsdp else _NARROW * layer_trained,
        buckets=0.0 if fsdp else 2 * _NARROW * min(trained, _BUCKET_NUMBERS),
        step_scratch=0.0 if offloaded else _WIDE * trained / ranks,
    )
