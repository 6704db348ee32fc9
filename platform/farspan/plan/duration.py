"""Seconds of a step on one rank: what is computed, and what of communication and offload does not hide behind it.

Torch-free, pure. A layer costs its matrix products, its attention and the bytes its other operations move; backward
counts as traced, attention's as 2.5 times its forward. Communication of a layer hides behind the computation of a
layer, except what has to arrive before it can begin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from farspan.plan.choice import Choice
from farspan.plan.machine import Machine
from farspan.plan.profile import LayerKind, ModelProfile, Work
from farspan.plan.sharing import Sharing

_ATTENTION_BACKWARD = 2.5
_KERNELS_PER_LAYER = 60  # of one pass in eager mode
_STEP_BYTES = 28  # AdamW reads and writes master, moments and gradient of a parameter
_STEP_BYTES_8BIT = 16


@dataclass(frozen=True, slots=True)
class Duration:
    """Seconds of one optimizer step."""

    compute_s: float
    exchange_s: float
    """Attention's communication that is waited for."""
    weights_s: float
    """Gathering weights and summing gradients that is waited for."""
    offload_s: float
    """Activations and optimizer states between tiers that is waited for."""
    optimizer_s: float
    flops: float
    """Operations of matrix products and attention of one rank, recomputation not counted."""

    @property
    def step_s(self) -> float:
        return self.compute_s + self.exchange_s + self.weights_s + self.offload_s + self.optimizer_s


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer of a rank: seconds of a forward and a backward, of attention in them, and of its messages."""

    count: int
    forward_s: float
    again_s: float
    """What a recomputation takes: of a swapped layer less than its forward."""
    backward_s: float
    exchange_forward_s: float
    exchange_backward_s: float
    kept_bytes: float
    """Kept for backward; in chunk-wise training the arena."""
    weight_bytes: float


def duration(
    profile: ModelProfile,
    choice: Choice,
    sharing: Sequence[Sharing],
    tokens: int,
    machine: Machine,
    kept: Sequence[float],
    spill_tier: str = "host",
) -> Duration:
    """One step: `dp` sequences of `tokens` side by side. `kept` are bytes each kind of layer keeps for backward."""
    layers = _layers(profile, choice, sharing, tokens, machine, kept)
    chunked = choice.chunk != "none"
    # Chunk-wise training runs forward once for keys and values, and once more for each chunk's backward.
    forwards = 1 + int(choice.recompute) + int(chunked)
    spared = sum(x.count * (x.forward_s - x.again_s) for x in layers)
    compute = sum(x.count * (forwards * x.forward_s + x.backward_s) for x in layers) - spared
    exchange = sum(x.count * (forwards * x.exchange_forward_s + x.exchange_backward_s) for x in layers)
    shard = tokens / choice.sp
    compute += _root_s(profile, choice, shard, machine) + _launch_s(profile, choice, shard, forwards, machine)
    optimizer, moved = _optimizer_s(profile, choice, machine)
    return Duration(
        compute_s=compute,
        exchange_s=exchange,
        weights_s=_weights_s(profile, choice, layers, tokens, machine),
        offload_s=moved + _activations_s(choice, layers, tokens, machine, spill_tier),
        optimizer_s=optimizer,
        flops=_useful_flops(profile, choice, tokens),
    )


def layer_seconds(
    profile: ModelProfile, choice: Choice, sharing: Sequence[Sharing], tokens: int, machine: Machine
) -> tuple[float, float]:
    """Seconds of (forward, backward) of a layer, the mean over all of them; what it waits for others counts."""
    layers = _layers(profile, choice, sharing, tokens, machine, [0.0] * len(profile.kinds))
    forward = sum(x.count * (x.forward_s + x.exchange_forward_s) for x in layers)
    backward = sum(x.count * (x.backward_s + x.exchange_backward_s) for x in layers)
    return forward / profile.num_layers, backward / profile.num_layers


def _layers(
    profile: ModelProfile,
    choice: Choice,
    sharing: Sequence[Sharing],
    tokens: int,
    machine: Machine,
    kept: Sequence[float],
) -> list[_Layer]:
    return [
        _layer(kind, profile, choice, share, tokens, machine, size)
        for kind, share, size in zip(profile.kinds, sharing, kept, strict=True)
    ]


def _layer(
    kind: LayerKind,
    profile: ModelProfile,
    choice: Choice,
    share: Sharing,
    tokens: int,
    machine: Machine,
    kept: float,
) -> _Layer:
    shard, attention = tokens / choice.sp, 0.0
    forward, backward = _work_s(kind.whole.forward, shard, machine), _work_s(kind.whole.backward, shard, machine)
    if kind.rest is not None:
        # The mixer runs over the whole sequence on every rank.
        forward = _split_s(kind.whole.forward, kind.rest.forward, shard, tokens, machine)
        backward = _split_s(kind.whole.backward, kind.rest.backward, shard, tokens, machine)
    if kind.attention is not None:
        speed = machine.device.flops * machine.efficiency.attention
        attention = kind.attention.flops(tokens) * share.q_factor / choice.sp / speed
    if choice.tiled_mlp and kind.tiled is not None:
        # A tile is computed again before its backward.
        mlp = _work_s(kind.whole.forward, shard, machine) - _work_s(kind.tiled.forward, shard, machine)
        backward += max(0.0, mlp)
    ahead, behind = _exchange_s(choice, share, shard, attention, machine)
    if kind.attention is None and choice.sp > 1:
        # Every rank sends its tokens to every other one.
        sent = kind.boundary(shard) * (choice.sp - 1) / machine.between(choice.sp)
        ahead = behind = sent
    return _Layer(
        count=kind.count,
        forward_s=forward + attention,
        again_s=forward + attention - _spared_s(kind, choice, shard, attention, machine),
        backward_s=backward + _ATTENTION_BACKWARD * attention,
        exchange_forward_s=ahead,
        exchange_backward_s=behind,
        kept_bytes=kept,
        weight_bytes=2.0 * kind.num_parameters,
    )


def _spared_s(kind: LayerKind, choice: Choice, shard: float, attention_s: float, machine: Machine) -> float:
    """Seconds of a recomputation that a swap saves: attention, and the products of its share of the tokens."""
    if choice.swap_share == 0:
        return 0.0
    products = kind.whole.forward.flops(shard) / (machine.device.flops * machine.efficiency.gemm)
    return attention_s + choice.swap_share * products


def _work_s(work: Work, tokens: float, machine: Machine) -> float:
    share = machine.efficiency
    products = work.flops(tokens) / (machine.device.flops * share.gemm)
    return products + work.moved(tokens) / (machine.device.memory_bandwidth * share.memory)


def _split_s(all_of_it: Work, rest: Work, shard: float, tokens: float, machine: Machine) -> float:
    return _work_s(rest, shard, machine) + _work_s(all_of_it, tokens, machine) - _work_s(rest, tokens, machine)


def _exchange_s(
    choice: Choice, share: Sharing, shard: float, attention_s: float, machine: Machine
) -> tuple[float, float]:
    """Seconds waited for in (forward, backward) of one layer."""
    if choice.sp == 1:
        return 0.0, 0.0
    near, far = machine.between(share.num_near), machine.between(choice.sp)
    # Queries one way and what they found the other: both directions of a link carry at once.
    far *= 2 if choice.strategy == "tokenring" else 1
    found = []
    for near_bytes, far_bytes, behind in (
        (share.near_forward, share.far_forward, attention_s),
        (share.near_backward, share.far_backward, attention_s * _ATTENTION_BACKWARD),
    ):
        heads, ring = near_bytes * shard / near, far_bytes * shard / far
        first, later = heads / share.stages, heads * (1 - 1 / share.stages)
        hidden = 0.0 if choice.strategy == "allgather" else behind
        found.append(first + max(0.0, later + ring - hidden))
    return found[0], found[1]


def _root_s(profile: ModelProfile, choice: Choice, shard: float, machine: Machine) -> float:
    """Embedding, norm and the loss, whose logits are computed again in backward, but for the last tile's."""
    forward_s, backward_s = (_work_s(w, shard, machine) for w in (profile.loss.forward, profile.loss.backward))
    again = 1.0 - min(1.0, choice.loss_tile_tokens / _piece(choice, shard))
    return _work_s(profile.outside, shard, machine) + forward_s * (1.0 + again) + backward_s


def _piece(choice: Choice, shard: float) -> float:
    """A rank's tokens of one forward."""
    pieces = math.ceil(shard * choice.sp / choice.chunk_tokens) if choice.chunk != "none" else 1
    return shard / pieces


def _launch_s(profile: ModelProfile, choice: Choice, shard: float, forwards: int, machine: Machine) -> float:
    """What many small pieces cost that few large ones do not: each kernel's launch."""
    tokens = _piece(choice, shard)
    tiles = math.ceil(tokens / profile.width) if choice.tiled_mlp else 1
    # Of an MLP's tile, and of two norms' that are four times as large.
    kernels = profile.num_layers * (_KERNELS_PER_LAYER + (6 + 9 / 2) * (tiles - 1)) * (forwards + 2)
    kernels += 12 * math.ceil(tokens / choice.loss_tile_tokens)
    return shard / tokens * kernels * machine.efficiency.launch_s


def _weights_s(profile: ModelProfile, choice: Choice, layers: Sequence[_Layer], tokens: int, machine: Machine) -> float:
    """Gathering and summing of one layer hides behind the computation of another one."""
    ranks = choice.num_ranks
    if ranks == 1:
        return 0.0
    speed, share = machine.between(ranks), (ranks - 1) / ranks
    trained = choice.lora_rank * profile.lora_width / profile.num_parameters if choice.lora_rank else 1.0
    wide = 2.0 if choice.engine == "fsdp2" else 1.0
    pieces = math.ceil(tokens / choice.chunk_tokens) if choice.chunk != "none" else 1
    waited = 0.0
    for layer in layers:
        gather = layer.weight_bytes * share / speed if choice.shards_weights else 0.0
        # Without shards every rank sums whole gradients: twice the bytes of a reduce-scatter.
        reduce = layer.weight_bytes * trained * share / speed * (wide if choice.shards_weights else 2.0)
        forwards = 1 + int(choice.chunk != "none")
        forward_s, backward_s = layer.forward_s / pieces, (layer.backward_s + layer.forward_s) / pieces
        waited += layer.count * pieces * forwards * max(0.0, gather - forward_s)
        waited += layer.count * pieces * max(0.0, gather + reduce - backward_s)
    root = 2.0 * profile.root_parameters * share / speed
    return (
        waited + root * (1 + wide * trained) + (0.0 if choice.shards_weights else 2.0 * profile.num_parameters / speed)
    )


def _optimizer_s(profile: ModelProfile, choice: Choice, machine: Machine) -> tuple[float, float]:
    """(seconds of the step itself, seconds its states and gradients travel)."""
    trained = choice.lora_rank * profile.lora_width if choice.lora_rank else profile.num_parameters
    numbers = trained / choice.num_ranks
    touched = numbers * (_STEP_BYTES_8BIT if choice.optimizer == "adamw8bit" else _STEP_BYTES)
    if choice.offload_optimizer == "none":
        return touched / (machine.device.memory_bandwidth * machine.efficiency.memory), 0.0
    # The norm of all gradients has to be known first, so the step does not begin behind backward.
    travel = numbers * (4 + 2) / machine.spill_bandwidth("host")
    return touched / (machine.host_bandwidth / machine.devices_per_node), travel


def _activations_s(choice: Choice, layers: Sequence[_Layer], tokens: int, machine: Machine, tier: str) -> float:
    """What a layer keeps leaves while the next one runs, and comes back one layer ahead."""
    if choice.offload_activations == "none":
        return 0.0
    if choice.chunk != "none":
        return _arena_s(choice, layers, tokens, machine, tier)
    waited = 0.0
    for layer in layers:
        travel = layer.kept_bytes / machine.spill_bandwidth(tier)
        back = layer.backward_s + (layer.again_s if choice.recompute else 0.0)
        waited += layer.count * (max(0.0, travel - layer.forward_s) + max(0.0, travel - back))
    return waited


def _arena_s(choice: Choice, layers: Sequence[_Layer], tokens: int, machine: Machine, tier: str) -> float:
    """Every chunk reads the keys and values before it in each forward and in backward, and there their gradients too.

    On average half of the arena lies before a chunk; gradients go back while the next layer's are on their way.
    """
    chunks, forwards, waited = math.ceil(tokens / choice.chunk_tokens), 2 + int(choice.recompute), 0.0
    for layer in layers:
        before = layer.kept_bytes / 2 * (chunks - 1) / 2
        travel = before * (forwards + 2) / machine.spill_bandwidth(tier)
        waited += layer.count * max(0.0, travel - forwards * layer.forward_s - layer.backward_s)
    return waited


def _useful_flops(profile: ModelProfile, choice: Choice, tokens: int) -> float:
    """Forward and backward once, as model FLOPs utilization counts them: attention's backward twice its forward."""
    shard = tokens / choice.sp
    total = profile.loss.forward.flops(shard) + profile.loss.backward.flops(shard)
    for kind in profile.kinds:
        part = kind.whole.forward.flops(shard) + kind.whole.backward.flops(shard)
        if kind.attention is not None:
            part += 3 * kind.attention.flops(tokens) / choice.sp
        total += kind.count * part
    return total
