"""What one choice costs on one machine: bytes of every tier, seconds of a step, and whether it may run. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from farspan.plan.choice import Choice, broken_rule
from farspan.plan.duration import Duration, duration
from farspan.plan.footprint import Footprint, arena_of, footprint, kept_of
from farspan.plan.machine import Machine, size_text
from farspan.plan.profile import ModelProfile
from farspan.plan.sharing import Ways


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be planned: sequences of `tokens` of a model on a machine."""

    profile: ModelProfile
    machine: Machine
    tokens: int
    ways: Ways
    passes: int = 1
    """Sequences one after the other on a process in a step."""


@dataclass(frozen=True, slots=True)
class Overflow:
    """A tier that a plan does not fit into."""

    tier: str
    bytes: float
    limit: float
    largest: str
    """The buffer with the most bytes in it."""

    def __str__(self) -> str:
        where = "device" if self.tier == "device" else f"{self.tier} memory"
        over = size_text(self.bytes - self.limit)
        used, limit = size_text(self.bytes), size_text(self.limit)
        return f"{where} overflows by {over} ({used} of {limit}); most is {self.largest}"


@dataclass(frozen=True, slots=True)
class Plan:
    """A choice and its prediction for one rank."""

    choice: Choice
    tokens: int
    footprint: Footprint
    tiers: Mapping[str, float]
    duration: Duration
    flops_peak: float
    device_limit: float

    @property
    def step_s(self) -> float:
        return self.duration.step_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all sequences of a step, a second."""
        return self.choice.dp * self.tokens / self.step_s

    @property
    def seconds_per_token(self) -> float:
        return self.step_s / (self.choice.dp * self.tokens)

    @property
    def flops_utilization(self) -> float:
        """Useful operations as a share of the device's peak."""
        return self.duration.flops / self.step_s / self.flops_peak


def overflow(task: Task, choice: Choice, found: Footprint | None = None) -> Overflow | None:
    """The first tier `choice` does not fit into."""
    found = found or footprint_of(task, choice)
    limits = task.machine.tier_bytes()
    for tier, used in found.tiers(limits).items():
        limit = limits.get(tier, 0.0)
        if used > limit:
            return Overflow(tier, used, limit, _largest(found, tier))
    return None


def footprint_of(task: Task, choice: Choice) -> Footprint:
    """Bytes of `choice`."""
    ways = task.ways[choice.strategy, choice.sp, choice.ulysses]
    return footprint(task.profile, choice, ways, task.tokens, task.passes)


def plan_of_choice(task: Task, choice: Choice, found: Footprint | None = None) -> Plan:
    """The prediction of `choice`, legal or not."""
    found = found or footprint_of(task, choice)
    sharing = task.ways[choice.strategy, choice.sp, choice.ulysses]
    shard = task.tokens / choice.sp
    kept = [
        kept_of(kind, choice, share, shard, task.tokens)
        if choice.chunk == "none"
        else arena_of(kind, choice, share, shard, task.profile.itemsize)
        for kind, share in zip(task.profile.kinds, sharing, strict=True)
    ]
    limits = task.machine.tier_bytes()
    tiers = found.tiers(limits)
    slowest = next((name for name in ("nvme", "cxl") if tiers.get(name)), "host")
    time = duration(task.profile, choice, sharing, task.tokens, task.machine, kept, slowest)
    return Plan(choice, task.tokens, found, tiers, time, task.machine.device.flops, limits["device"])


def refusal(task: Task, choice: Choice) -> str | None:
    """Why `choice` may not run, in one sentence; none: it may."""
    rule = broken_rule(choice, task.profile, task.tokens)
    if rule is not None:
        return rule
    over = overflow(task, choice)
    return None if over is None else str(over)


def _largest(found: Footprint, tier: str) -> str:
    if tier == "device":
        return max(found.device, key=lambda name: found.device[name])
    return "optimizer states" if found.optimizer_host > found.activations_host else "offloaded activations"
