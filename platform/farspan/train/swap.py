"""`memory.swap_share=auto`: how much of a recomputed layer waits in the tier, by MEMO's program over measured speeds.

Every rank measures its own layers and its own way to the tier, all at once, as in a step. Each then decides by the
slowest copies, the quickest layers and the least room of all ranks: the same share everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.fsdp import FSDPModule

from farspan.activations.memo import LayerCost, choose_alpha, in_hundredths, simulate_stall
from farspan.activations.memo_cost import measure_layers
from farspan.memory.speeds import measure_speed
from farspan.memory.striped import StripedTiers
from farspan.models.parts import decoder_layers
from farspan.parallel.whole import WholeSequence
from farspan.plan.tiers import ACTIVATIONS
from farspan.train.checkpoint import of_all_ranks
from farspan.train.offload import RunTiers
from farspan.train.rescue import refused_without_memory
from farspan.train.step import TrainStep

# RunOffload keeps the last layer on the device.
_NUM_KEPT = 1


@dataclass(frozen=True, slots=True)
class SwapFacts:
    """What one rank, or the worst of all, found. `host_bytes` are free in the tier."""

    layer: LayerCost
    bytes_per_s: float
    host_bytes: int


def choose_share(step: TrainStep, tiers: RunTiers, limit_gib: float = 0.0) -> tuple[float, str]:
    """(the share, one line that says why); collective, the same on every rank.

    Two forwards of a sequence of the run, and some copies, of so little that it fits into a limit (0: none); weights,
    gradients, random numbers, the cursor and what the run counts as read stay as they are.

    Raises:
        PlanError: the tier has no room for the inputs and attention outputs of the layers.
        OutOfMemoryError: memory did not suffice to measure, on the device or in the tier.
        TierError: the tier gives back other bytes than were stored.
    """
    with refused_without_memory("measuring for memory.swap_share=auto"):
        mine = _measure(step, tiers, limit_gib)
    return decide(worst_of(of_all_ranks(mine)), len(decoder_layers(step.loss.model)), tiers.of(ACTIVATIONS).label)


def worst_of(found: Sequence[SwapFacts]) -> SwapFacts:
    """What no rank is worse than."""
    layers = [one.layer for one in found]
    return SwapFacts(
        layer=LayerCost(
            input_bytes=max(layer.input_bytes for layer in layers),
            attention_bytes=max(layer.attention_bytes for layer in layers),
            rest_bytes=max(layer.rest_bytes for layer in layers),
            forward_s=min(layer.forward_s for layer in layers),
            backward_s=min(layer.backward_s for layer in layers),
        ),
        bytes_per_s=min(one.bytes_per_s for one in found),
        host_bytes=min(one.host_bytes for one in found),
    )


def decide(facts: SwapFacts, num_layers: int, tier: str) -> tuple[float, str]:
    """(the share in whole hundredths, so that the number told can be set in its place, the line); pure.

    0 where not even what always moves could be hidden, or it and less than a hundredth of the rest: nothing is swapped
    then, and layers are computed again whole.
    """
    layer, speed = facts.layer, facts.bytes_per_s
    choice = choose_alpha(layer, num_layers, speed, facts.host_bytes, _NUM_KEPT)
    share = in_hundredths(choice.alpha)
    if share == 0:
        then = ". At share 0 only the inputs of layers wait there, and layers are computed again whole, attention too"
    else:
        stall_s = simulate_stall(layer, num_layers, share, speed, _NUM_KEPT)
        then = f"; copies are expected to hold a sequence up for {stall_s:.3g} s"
    return share, (
        f"memory.swap_share=auto is {share:g}: a layer's forward takes {layer.forward_s:.3g} s, "
        f"{_mib(layer.swapped_bytes(0))} of it move at any share above 0 and {_mib(layer.rest_bytes)} of products may, "
        f"{tier} takes {speed / 1e9:.3g} GB/s and has {_mib(facts.host_bytes)}; {choice.reason}{then}"
    )


def _measure(step: TrainStep, tiers: RunTiers, limit_gib: float) -> SwapFacts:
    devices, home = [step.device] if step.device.type == "cuda" else [], tiers.of(ACTIVATIONS)
    with torch.random.fork_rng(devices=devices):
        return SwapFacts(_layer_cost(step), _bytes_per_s(home, step.device, limit_gib), _free_bytes(home))


def _layer_cost(step: TrainStep) -> LayerCost:
    """Of the first sequence of this rank, as it is trained on."""
    batch = step.reader.lay(step.reader.plan.sequence(step.mesh.dp_rank))
    layout = step.sequence.lay_out(batch.num_tokens, batch.bounds)
    shard = layout.shard(batch, step.exchange.rank).to(step.device)
    attention, whole = step.sequence.attention(layout, shard.bounds), WholeSequence(shard.bounds, step.exchange, layout)
    labels = torch.ones((), device=step.device)
    try:
        return measure_layers(
            decoder_layers(step.loss.model), lambda: step.loss(shard, attention, labels, whole), step.device
        )
    finally:
        for module in step.loss.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _bytes_per_s(home: StripedTiers, device: torch.device, limit_gib: float) -> float:
    """Of all tiers that share the load together, in the slower direction."""
    whole = sum(home.shares)
    # Each carries its share while the others carry theirs: all wait for the one that is through last.
    return min(
        measure_speed(tier, device, limit_gib).bytes_per_s * whole / share
        for tier, share in zip(home.tiers, home.shares, strict=True)
    )


def _free_bytes(home: StripedTiers) -> int:
    return sum(stats.capacity_bytes - stats.used_bytes for stats in (tier.stats() for tier in home.tiers))


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.4g} MiB"
