"""One training step as a list of allocations: an oracle for the planner that adds nothing up in closed form.

Layers run one after another in a mixed order; everything that is held is taken and given back by name, tier by tier.
What a layer of each kind keeps and needs comes from the profile; when it is there at the same time as what else is the
simulator's own knowledge.
"""

from __future__ import annotations

from collections.abc import Sequence

from farspan.plan.choice import Choice
from farspan.plan.footprint import ends_of, kept_of, norm_tile_bytes, on_rank, passes, tile_bytes
from farspan.plan.profile import LayerKind, ModelProfile
from farspan.plan.sharing import Sharing
from farspan.plan.states import states_of


class Tier:
    """Bytes by name; a name is taken once."""

    def __init__(self) -> None:
        self.held: dict[str, float] = {}
        self.peak = 0.0
        self.now = 0.0

    def take(self, name: str, size: float) -> None:
        assert name not in self.held, f"{name} is there already"
        assert size >= 0, f"{name} has {size} bytes"
        self.held[name] = size
        self.now += size
        self.peak = max(self.peak, self.now)

    def give(self, name: str) -> None:
        self.now -= self.held.pop(name)


class StepSimulator:
    """A step of `choice`; `device` and `host` hold the peaks after `run`."""

    def __init__(
        self, profile: ModelProfile, choice: Choice, sharing: Sequence[Sharing], tokens: int, passes: int
    ) -> None:
        self.profile, self.choice, self.tokens = profile, choice, tokens
        self.layers = _mixed_order(list(zip(profile.kinds, sharing, strict=True)))
        self.states, self.ends = states_of(profile, choice), ends_of(profile, choice)
        self.device, self.host = Tier(), Tier()
        self.chunked = choice.chunk != "none"
        self.shard = tokens / choice.sp
        self.alive = choice.chunk_tokens / choice.sp if self.chunked else self.shard
        self.offloads = choice.offload_activations != "none" and not self.chunked
        # A chunk runs forward and backward by itself, as a sequence of several does.
        self.passes = 2 if self.chunked else passes
        self.arena_on_host = choice.offload_activations != "none" and self.chunked

    def run(self) -> StepSimulator:
        device = self.device
        for name in ("weights", "optimizer", "buckets"):
            device.take(name, getattr(self.states, name))
        if self.choice.engine != "fsdp2":
            device.take("gradients", self.states.gradients)
        self.host.take("states", self.states.host)
        device.take("batch", 24 * self.shard)
        if self.choice.shards_weights:
            device.take("root", 2.0 * self.profile.root_parameters)
        if self.chunked:
            for number, (kind, share) in enumerate(self.layers):
                if kind.attention is not None:
                    size = kind.attention.arena_bytes(self.profile.itemsize) * share.kv_factor * self.shard
                    (self.host if self.arena_on_host else device).take(f"arena {number}", size)
        # The first chunk and the last one are as large as any other; a third sequence is like the second.
        for number in range(min(self.passes, 2)):
            self._forward()
            self._loss()
            self._backward()
            # The root's gradients go over the ranks in fp32: after every sequence, or after all chunks of one.
            if number == 1 or not self.chunked:
                whole = device.held["root gradient"]
                device.take("root sums", 2 * whole)
                self._sum_up("sums of the root", self.profile.num_parameters - self._in_layers())
                device.give("root sums")
                device.give("root gradient")
        # They may still be there when the optimizer begins.
        device.take("scratch", self.states.step_scratch + 3 * whole)
        return self

    def _gather(self, number: int) -> None:
        name = f"layer {number}"
        if self.choice.shards_weights and 0 <= number < len(self.layers) and name not in self.device.held:
            self.device.take(name, 2.0 * self.layers[number][0].num_parameters)

        arena = f"arena {number}"
        if self.arena_on_host and arena in self.host.held and arena not in self.device.held:
            self.device.take(arena, self.host.held[arena])

    def _reshard(self, number: int) -> None:
        if self.arena_on_host and f"arena {number}" in self.device.held:
            self.device.give(f"arena {number}")
        if f"layer {number}" in self.device.held:
            self.device.give(f"layer {number}")

    def _forward(self) -> None:
        self.device.take("outside", self.ends.saved(self.alive))
        for number, (kind, share) in enumerate(self.layers):
            self._gather(number)
            self._gather(number + 1)
            kept = kept_of(kind, self.choice, share, self.alive, self.tokens)
            self.device.take(f"kept {number}", kept)
            if not self.choice.recompute:
                peak = on_rank(kind, passes(kind, self.choice), "forward_peak", self.alive, self.tokens)
                saved = on_rank(kind, passes(kind, self.choice), "saved", self.alive, self.tokens)
                tile = tile_bytes(kind, self.choice, self.alive)
                self.device.take("forward", peak - saved + tile + share.buffer_bytes * self.alive)
                self.device.give("forward")
            self._reshard(number)
            if self.offloads:
                self.host.take(f"kept {number}", kept)
                # The copy of a layer has left when the one after the next begins; the last ones stay.
                if number >= 2 and number < len(self.layers):
                    self.device.give(f"kept {number - 2}")

    def _loss(self) -> None:
        device, profile = self.device, self.profile
        hidden = profile.width * profile.itemsize * self.alive
        for name in ("hidden", "hidden gradient", "norm gradient"):
            device.take(name, hidden)
        if "root gradient" not in device.held:
            device.take("root gradient", self.states.root_gradients)
        left = self.alive
        while left > 0:
            tile = min(left, float(self.choice.loss_tile_tokens))
            device.take("tile", profile.loss.peak(tile))
            if self.states.root_gradients:
                device.take("head", profile.vocab_size * profile.width * profile.itemsize)
                device.give("head")
            device.give("tile")
            left -= tile
        tile = norm_tile_bytes(profile.width, self.alive) if self.choice.tiled_mlp else 0.0
        device.take("final norm", self.ends.tail_peak(self.alive) + tile)
        for name in ("hidden", "hidden gradient", "norm gradient", "final norm"):
            device.give(name)
        device.give("outside")
        device.take("outside", max(0.0, self.ends.saved(self.alive) - self.ends.tail_saved(self.alive)))

    def _backward(self) -> None:
        last = len(self.layers) - 1
        for number in range(last, -1, -1):
            kind, share = self.layers[number]
            self._gather(number)
            self._gather(number - 1)
            if self.offloads:
                for wanted in (number, number - 1):
                    if wanted >= 0 and f"kept {wanted}" not in self.device.held:
                        self.device.take(f"kept {wanted}", self.host.held[f"kept {wanted}"])
            self.device.take("work", self._work(kind, share))
            self.device.take("layer gradients", self.states.layer_gradients * kind.num_parameters / self._largest())
            self.device.give("work")
            self.device.give("layer gradients")
            self._sum_up(f"sums {number}", kind.num_parameters)
            self._reshard(number)
            self.device.give(f"kept {number}")
            if self.offloads:
                self.host.give(f"kept {number}")
        self.device.give("outside")

    def _sum_up(self, name: str, num_parameters: float) -> None:
        """FSDP2 makes a module's sums when its first backward is done, and adds to them in the next."""
        if self.choice.engine != "fsdp2" or name in self.device.held:
            return
        # Adapters are in layers alone: frozen weights have no sums.
        trained = self._in_layers() if self.choice.lora_rank else self.profile.num_parameters
        if not (self.choice.lora_rank and name == "sums of the root"):
            self.device.take(name, self.states.gradients * num_parameters / trained)

    def _in_layers(self) -> int:
        return sum(kind.num_parameters for kind, _ in self.layers)

    def _largest(self) -> int:
        return max(kind.num_parameters for kind in self.profile.kinds)

    def _work(self, kind: LayerKind, share: Sharing) -> float:
        part = passes(kind, self.choice)
        name = "recompute_peak" if self.choice.recompute else "backward_peak"
        size = on_rank(kind, part, name, self.alive, self.tokens) + share.buffer_bytes * self.alive
        if self.choice.recompute:
            size += share.extra_saved_bytes * self.alive
        return size + tile_bytes(kind, self.choice, self.alive)


def _mixed_order(kinds: list[tuple[LayerKind, Sharing]]) -> list[tuple[LayerKind, Sharing]]:
    """Layers of all kinds, one of each in turn."""
    left = {number: kind.count for number, (kind, _) in enumerate(kinds)}
    order: list[tuple[LayerKind, Sharing]] = []
    while any(left.values()):
        for number, pair in enumerate(kinds):
            if left[number]:
                left[number] -= 1
                order.append(pair)
    return order
