"""The operations a step cannot do without, and the share of the devices' peak they make: model FLOPs utilization.

Counted as the field counts it (PaLM, https://arxiv.org/abs/2204.02311, appendix B): two operations for each weight and
token in forward, twice that in backward; attention only over the pairs a token may see. What recomputation does again
does not count. N parameters, T tokens, H query heads of D.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import PretrainedConfig

from farspan.config.schema import RunConfig
from farspan.models.rules import layer_rules
from farspan.plan.facts import model_facts
from farspan.plan.machine import DEVICES

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class UsefulWork:
    """What one sequence of a model costs."""

    per_token: float
    """Operations for each token beside attention."""
    per_pair: float
    """Operations for each (query, key) pair of one layer."""
    reaches: tuple[int | None, ...]
    """Of each attention layer: tokens it sees back; none: its whole document."""

    def flops(self, bounds: tuple[int, ...]) -> float:
        """Forward and backward of one packed sequence with documents at `bounds`."""
        pairs = sum(_pairs(stop - start, reach) for reach in self.reaches for start, stop in pairwise(bounds))
        return self.per_token * bounds[-1] + self.per_pair * pairs


def useful_work(config: RunConfig, model: PretrainedConfig) -> UsefulWork | None:
    """None where parameters do not say what a token costs: experts, of which a token meets only some."""
    text = model.get_text_config(decoder=True)
    if any((getattr(text, name, None) or 0) > 1 for name in _EXPERTS):
        return None
    facts = model_facts(model)
    # Looking a token up multiplies nothing; a tied table is counted once, as the head.
    lookups = 0 if getattr(text, "tie_word_embeddings", False) else facts.vocab_size * facts.width
    # Beside an adapter frozen weights get no gradients of their own: forward, and back through them.
    passes = 3 if config.lora.rank == 0 else 2
    reaches = tuple(rule.window or rule.chunk for rule in layer_rules(model) if not rule.recurrent)
    return UsefulWork(
        2.0 * passes * (facts.num_parameters - lookups), 3 * 4.0 * facts.num_q_heads * facts.head_dim, reaches
    )


def peak_flops(config: RunConfig, device: torch.device) -> tuple[float, str]:
    """(operations a second of one device, where that is from); 0 when nobody knows."""
    if config.resources.peak_tflops > 0:
        return config.resources.peak_tflops * 1e12, "resources.peak_tflops"
    if device.type != "cuda":
        return 0.0, "no CPU is in the table: measure it (farspan plan --calibrate) and set resources.peak_tflops"
    return table_peak(torch.cuda.get_device_name(device))


def table_peak(device_name: str) -> tuple[float, str]:
    """Peak of the known device that a driver's name for a GPU means."""
    words = device_name.lower().replace("-", " ").split()
    for device in DEVICES.values():
        kind, _, gigabytes = device.name.partition("-")
        if kind in words and (not gigabytes or f"{gigabytes}gb" in words):
            return device.flops, f"the data sheet of {device.name} (dense bf16)"
    return 0.0, f"{device_name} is not in the table: set resources.peak_tflops"


def _pairs(num_tokens: int, reach: int | None) -> int:
    """(query, key) pairs of a causal document; each token sees itself and, at most, `reach` tokens in all."""
    if reach is None or reach >= num_tokens:
        return num_tokens * (num_tokens + 1) // 2
    return reach * (reach + 1) // 2 + (num_tokens - reach) * reach
