"""Bytes of every memory tier at the worst moment of a step, on one rank. Torch-free, pure.

A step has four moments that can be the worst: the last layer's forward; the loss, while everything kept for backward is
there; the backward of some layer, when those before it still keep theirs and those after it have made their sums of
gradients; the optimizer step, when nothing is kept any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from farspan.plan.choice import Choice
from farspan.plan.profile import LayerKind, ModelProfile, Outside, Pass, Poly
from farspan.plan.sharing import Sharing
from farspan.plan.states import States, states_of

SLACK = 0.04
"""Share of the device's bytes an allocator with expandable segments loses between tensors."""
# Of what is offloaded: in forward one layer makes it and two are leaving, in backward one is used and one arrives.
_FORWARD_LAYERS, _BACKWARD_LAYERS = 3, 2
# Of one number of a norm's tile in backward: four copies in fp32, four narrow ones (`activations.tiled`).
_NORM_TILE_BYTES, _NORM_TILES = 24, 4
_BATCH_BYTES = 3 * 8  # tokens, labels and positions


@dataclass(frozen=True, slots=True)
class Footprint:
    """Named buffers in bytes: of the device at its worst `moment`, and of what lies in slower tiers."""

    moment: str
    device: Mapping[str, float]
    optimizer_host: float
    activations_host: float

    @property
    def device_bytes(self) -> float:
        return sum(self.device.values())

    def tiers(self, limits: Mapping[str, float]) -> dict[str, float]:
        """Bytes of each tier: the CPU's optimizer stays in local memory, activations take what is left, tier by tier.

        What fits nowhere is added to the first tier below the device, which then overflows.
        """
        used = {"device": self.device_bytes}
        slower = [name for name in limits if name != "device"]
        left = self.activations_host
        for name in slower:
            fixed = self.optimizer_host if name == "host" else 0.0
            taken = min(left, max(0.0, limits[name] - fixed))
            used[name], left = fixed + taken, left - taken
        if left > 0 or (self.optimizer_host > 0 and "host" not in used):
            lost = left + (0.0 if "host" in used else self.optimizer_host)
            used["host"] = used.get("host", 0.0) + lost
        return {name: size for name, size in used.items() if size > 0}


def footprint(
    profile: ModelProfile, choice: Choice, sharing: Sequence[Sharing], tokens: int, passes: int = 1
) -> Footprint:
    """What one sequence of `tokens` needs; `sharing` holds one entry for each kind of layer.

    `passes` sequences come one after the other in a step: from the second on, sums of gradients are there all the time.
    """
    states = states_of(profile, choice)
    shard, whole = tokens / choice.sp, float(tokens)
    # A chunk runs forward and backward by itself; only keys, values and their gradients outlive it.
    alive = choice.chunk_tokens / choice.sp if choice.chunk != "none" else shard
    kept, largest = _kept(profile, choice, sharing, alive, whole)
    offloaded = choice.offload_activations != "none" and choice.chunk == "none"
    arena, layer_arena = _arena(profile, choice, sharing, shard)
    arena_host = arena if choice.offload_activations != "none" else 0.0
    leaving, held = (min(kept, n * largest) if offloaded else kept for n in (_FORWARD_LAYERS, _BACKWARD_LAYERS))
    always = {
        "weights": states.weights,
        "optimizer": states.optimizer + states.buckets,
        "whole layers": states.gathered,
        "batch": _BATCH_BYTES * shard,
        "KV arena": min(arena, _BACKWARD_LAYERS * layer_arena) if arena_host else arena,
    }
    # FSDP2 makes a layer's sums in its backward; DeepSpeed keeps what it made; a chunk adds to those before it.
    early = states.gradients if passes > 1 or choice.chunk != "none" or choice.engine != "fsdp2" else 0.0
    waiting, summed = held, early
    if not early and offloaded:
        waiting, summed = _arriving(profile, choice, states, held, largest)
    elif not early:
        waiting, summed = _waiting(profile, choice, sharing, states, alive, whole)
    ends = ends_of(profile, choice)
    outside = ends.saved(alive)
    # The final norm has run backward before the last layer does.
    shared = max(0.0, outside - ends.tail_saved(alive))
    works = [_working(kind, choice, share, alive, whole) for kind, share in zip(profile.kinds, sharing, strict=True)]
    moments = {
        "forward": {
            **always,
            "gradients": early,
            "kept for backward": leaving + outside,
            "layer at work": max(forward for forward, _ in works),
        },
        "loss": {
            **always,
            "gradients": early,
            "kept for backward": held + outside,
            "loss tile": _loss(profile, choice, states, alive),
        },
        "backward": {
            **always,
            "gradients": summed,
            "kept for backward": waiting + shared,
            "layer at work": max(backward for _, backward in works),
            "whole gradients": states.root_gradients + states.layer_gradients,
        },
        "optimizer step": {
            **always,
            "gradients": states.gradients,
            "kept for backward": 0.0,
            "whole gradients": 3 * states.root_gradients,
            "optimizer scratch": states.step_scratch,
        },
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    device = {name: size for name, size in moments[moment].items() if size > 0}
    device["allocator slack"] = SLACK * sum(device.values())
    return Footprint(moment, device, states.host, kept if offloaded else arena_host)


def passes(kind: LayerKind, choice: Choice) -> Pass:
    """How this layer runs."""
    return kind.tiled if choice.tiled_mlp and kind.tiled is not None else kind.whole


def ends_of(profile: ModelProfile, choice: Choice) -> Outside:
    """How what is not in a layer runs."""
    return profile.outside_tiled if choice.tiled_mlp else profile.outside_layers


def on_rank(kind: LayerKind, part: Pass, name: str, shard: float, whole: float) -> float:
    """Bytes of one entry of a pass: a recurrent mixer sees the whole sequence, the rest a rank's own tokens."""
    poly: Poly = getattr(part, name)
    if kind.rest is None:
        return poly(shard)
    rest: Poly = getattr(kind.rest, name)
    return rest(shard) + max(0.0, poly(whole) - rest(whole))


def kept_of(kind: LayerKind, choice: Choice, share: Sharing, shard: float, whole: float) -> float:
    """Bytes one layer keeps from forward to backward."""
    if choice.recompute:
        return kind.boundary(shard) + swapped_of(kind, choice, share, shard)
    return on_rank(kind, passes(kind, choice), "saved", shard, whole) + share.extra_saved_bytes * shard


def swapped_of(kind: LayerKind, choice: Choice, share: Sharing, shard: float) -> float:
    """Bytes of a layer that is computed again which wait elsewhere instead: attention, and products of some tokens."""
    if choice.swap_share == 0:
        return 0.0
    return kind.attention_out(shard) * share.q_factor + choice.swap_share * kind.products(shard)


def mlp_tile(width: int, shard: float) -> float:
    """Tokens of an MLP tile: as many tiles as the model's width fits into the tokens (ALST)."""
    return min(shard, float(width))


def norm_tile_bytes(width: int, shard: float) -> float:
    """Most bytes alive while one tile of a norm runs backward."""
    return _NORM_TILE_BYTES * width * min(shard, float(_NORM_TILES * width))


def tile_bytes(kind: LayerKind, choice: Choice, shard: float) -> float:
    """Most bytes alive in a tile of a layer's MLP or norms; 0 where it has none."""
    if passes(kind, choice) is not kind.tiled:
        return 0.0
    return max(kind.mlp_peak(mlp_tile(kind.width, shard)), norm_tile_bytes(kind.width, shard))


def _kept(
    profile: ModelProfile, choice: Choice, sharing: Sequence[Sharing], shard: float, whole: float
) -> tuple[float, float]:
    layers = [
        (kind.count, kept_of(kind, choice, share, shard, whole))
        for kind, share in zip(profile.kinds, sharing, strict=True)
    ]
    return sum(count * size for count, size in layers), max(size for _, size in layers)


def _arriving(
    profile: ModelProfile, choice: Choice, states: States, held: float, largest: float
) -> tuple[float, float]:
    """As `_waiting`, where what layers kept comes back from host memory.

    The second layer computes while the first one's is there already; then the first one has its own alone.
    """
    sums = [_sums(profile, kind, choice, states) for kind in profile.kinds]
    done = sum(kind.count * size for kind, size in zip(profile.kinds, sums, strict=True)) - min(sums)
    return max((held, max(0.0, done - min(sums))), (min(held, largest), done), key=sum)


def _sums(profile: ModelProfile, kind: LayerKind, choice: Choice, states: States) -> float:
    """Bytes of the summed gradients of a layer. Adapters are in layers alone."""
    root = 0 if choice.lora_rank else profile.root_parameters
    in_layers = sum(other.count * other.num_parameters for other in profile.kinds)
    return states.gradients / (in_layers + root) * kind.num_parameters


def _waiting(
    profile: ModelProfile, choice: Choice, sharing: Sequence[Sharing], states: States, shard: float, whole: float
) -> tuple[float, float]:
    """(kept by layers that are to come, summed gradients of those that are done) where their sum is largest.

    A layer that is done gives what it kept and leaves its sums: whichever is more, as the order of kinds is not known.
    """
    waiting = summed = 0.0
    for kind, share in zip(profile.kinds, sharing, strict=True):
        kept, sums = kept_of(kind, choice, share, shard, whole), _sums(profile, kind, choice, states)
        waiting += kind.count * kept if kept >= sums else 0.0
        summed += kind.count * sums if kept < sums else 0.0
    return waiting, summed


def _working(kind: LayerKind, choice: Choice, share: Sharing, shard: float, whole: float) -> tuple[float, float]:
    """Most bytes a layer needs beyond what is kept, in (forward, backward)."""
    part = passes(kind, choice)
    # A tile comes on top: it begins when the layer's other tensors are there.
    tile = tile_bytes(kind, choice, shard)
    beyond = share.buffer_bytes * shard + tile
    if choice.recompute:
        again = on_rank(kind, part, "recompute_peak", shard, whole) + share.extra_saved_bytes * shard
        # Forward keeps nothing but inputs, so that backward, which begins with it, needs more.
        return 0.0, again + beyond
    forward = on_rank(kind, part, "forward_peak", shard, whole) - on_rank(kind, part, "saved", shard, whole)
    return forward + beyond, on_rank(kind, part, "backward_peak", shard, whole) + beyond


def arena_of(kind: LayerKind, choice: Choice, share: Sharing, shard: float, itemsize: int) -> float:
    """Bytes of one layer's keys, values and their gradients in chunk-wise training."""
    if choice.chunk == "none" or kind.attention is None:
        return 0.0
    return kind.attention.arena_bytes(itemsize) * share.kv_factor * shard


def _arena(profile: ModelProfile, choice: Choice, sharing: Sequence[Sharing], shard: float) -> tuple[float, float]:
    """(of all layers, of the largest one)."""
    layers = [
        (kind.count, arena_of(kind, choice, share, shard, profile.itemsize))
        for kind, share in zip(profile.kinds, sharing, strict=True)
    ]
    return sum(count * size for count, size in layers), max(size for _, size in layers)


def _loss(profile: ModelProfile, choice: Choice, states: States, shard: float) -> float:
    """The last hidden states and their gradient; with them a tile and the head's gradient of it, or the final norm."""
    tile = min(shard, float(choice.loss_tile_tokens))
    hidden = 3 * profile.width * profile.itemsize * shard
    head = profile.vocab_size * profile.width * profile.itemsize if states.root_gradients else 0.0
    norm = ends_of(profile, choice).tail_peak(shard)
    norm += norm_tile_bytes(profile.width, shard) if choice.tiled_mlp else 0.0
    return hidden + states.root_gradients + max(profile.loss.peak(tile) + head, norm)
