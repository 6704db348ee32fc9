"""Find the way to train: every choice is tried or pruned with its reason, legal ones are ranked by time. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import lcm

from farspan.plan.choice import Choice, broken_rule
from farspan.plan.cost import Overflow, Plan, Task, footprint_of, overflow, plan_of_choice
from farspan.plan.states import states_of
from farspan.plan.swap import with_share

CHUNKS = (8_192, 32_768, 131_072)
LOSS_TILES = (1_024, 8_192)
WEIGHTS = (("fsdp2", 3), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3))
# Plans this close in time are the same to a clock; the simplest of them wins.
_SAME_TIME = 1.01
_ROOMY = 0.9


@dataclass(frozen=True, slots=True)
class Space:
    """What may be chosen. 8-bit states change the numbers of a run, so they have to be asked for."""

    weights: tuple[tuple[str, int], ...] = WEIGHTS
    optimizers: tuple[str, ...] = ("adamw",)
    chunks: tuple[int, ...] = CHUNKS
    loss_tiles: tuple[int, ...] = LOSS_TILES
    lora_rank: int = 0
    swap_share: float | str = 0.0
    """memory.swap_share, of choices that recompute layers and offload; auto: as it is predicted."""
    host_arena: bool = True
    """Whether the KV arena of chunk-wise training may lie in host memory."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A choice that may not run, and why."""

    choice: Choice
    reason: str | Overflow


@dataclass(frozen=True, slots=True)
class Found:
    """Legal plans, the best first, and everything that was refused."""

    plans: tuple[Plan, ...]
    rejected: tuple[Rejected, ...]

    @property
    def best(self) -> Plan | None:
        return self.plans[0] if self.plans else None

    def best_of_each_sharing(self) -> list[Plan]:
        """The best plan of every way to share a sequence, the best first."""
        firsts: dict[tuple[int, str, int], Plan] = {}
        for plan in self.plans:
            firsts.setdefault((plan.choice.sp, plan.choice.strategy, plan.choice.ulysses), plan)
        return list(firsts.values())


@dataclass(frozen=True, slots=True)
class Limit:
    """How far a plan goes when sequences grow."""

    longest_tokens: int
    breaks: Overflow | None
    """What no longer fits beyond it; none: nothing up to the longest length that was tried."""


def search(task: Task, space: Space = Space()) -> Found:
    """Try everything `space` allows on the task's machine."""
    plans: list[Plan] = []
    rejected: list[Rejected] = []
    for group in _groups(task, space):
        static = _static_overflow(task, group)
        for choice in choices_of(task, space, group):
            reason: str | Overflow | None = static or broken_rule(choice, task.profile, task.tokens)
            if reason is None:
                found = footprint_of(task, choice)
                reason = overflow(task, choice, found)
                if reason is None:
                    plans.append(plan_of_choice(task, choice, found))
                    continue
            rejected.append(Rejected(choice, reason))
    return Found(tuple(rank(plans)), tuple(rejected))


def all_choices(task: Task, space: Space = Space()) -> Iterator[Choice]:
    """Every choice of the space, legal or not."""
    for group in _groups(task, space):
        yield from choices_of(task, space, group)


def rank(plans: Sequence[Plan]) -> list[Plan]:
    """By time of a token; among the fastest that a clock cannot tell apart, the simplest first."""
    ordered = sorted(plans, key=lambda plan: plan.seconds_per_token)
    if not ordered:
        return []
    close = ordered[0].seconds_per_token * _SAME_TIME
    same = [plan for plan in ordered if plan.seconds_per_token <= close]
    same.sort(key=lambda plan: (_num_levers(plan.choice) + 2 * _is_tight(plan), plan.footprint.device_bytes))
    return [*same, *ordered[len(same) :]]


def limit_of(task: Task, choice: Choice, most: int = 1 << 30) -> Limit:
    """The longest sequence `choice` can train on this machine, and what overflows beyond it."""
    step = _step_tokens(choice)

    def over(steps: int) -> Overflow | None:
        return overflow(replace(task, tokens=steps * step), choice)

    fits, fails = 0, most // step
    if fails == 0 or over(fails) is None:
        return Limit(fails * step, None)
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if over(middle) is None else (fits, middle)
    # The asked length need not be a multiple of the step.
    asked = task.tokens if overflow(task, choice) is None else 0
    return Limit(max(fits * step, asked if asked < fails * step else 0), over(fails))


def longest(task: Task, space: Space = Space()) -> tuple[int, Choice] | None:
    """The longest sequence up to the task's that any plan can train on this machine, and that plan."""
    best: tuple[int, Choice] | None = None
    for choice in all_choices(task, space):
        if broken_rule(choice, task.profile, _step_tokens(choice)) is not None:
            continue
        step = _step_tokens(choice)
        beyond = step if best is None else (best[0] // step + 1) * step
        # A plan that cannot go further than the best one so far needs no closer look.
        if beyond <= task.tokens and overflow(replace(task, tokens=beyond), choice) is None:
            best = (limit_of(task, choice, most=task.tokens).longest_tokens, choice)
    return best


def fewest_nodes(task: Task, space: Space = Space(), most: int = 64) -> tuple[int, Choice] | None:
    """The smallest power of two of nodes on which the task fits, and a plan for it."""
    nodes = task.machine.nodes * 2
    while nodes <= most:
        larger = replace(task, machine=replace(task.machine, nodes=nodes))
        found = search(larger, space).best
        if found is not None:
            return nodes, found.choice
        nodes *= 2
    return None


def choices_of(task: Task, space: Space, group: Choice) -> Iterator[Choice]:
    """Every way to keep activations, with the mesh and the weights of `group`."""
    for recompute in (False, True):
        for tiled in (False, True):
            if tiled and all(kind.tiled is None for kind in task.profile.kinds):
                continue
            for tile in space.loss_tiles:
                part = replace(group, recompute=recompute, tiled_mlp=tiled, loss_tile_tokens=tile)
                yield part
                if len(task.machine.tier_bytes()) > 1:
                    yield with_share(task, replace(part, offload_activations="cpu"), space.swap_share)
                for chunk in space.chunks:
                    if chunk < task.tokens and tile <= chunk:
                        chunked = replace(part, chunk="seco", chunk_tokens=chunk)
                        yield chunked
                        if space.host_arena and len(task.machine.tier_bytes()) > 1:
                            yield replace(chunked, offload_activations="cpu")


def _groups(task: Task, space: Space) -> Iterator[Choice]:
    """Every mesh, strategy and sharding of weights."""
    devices = task.machine.num_devices
    hosts = ("none", "cpu") if task.machine.host_bytes > 0 else ("none",)
    for strategy, sp, inner in task.ways:
        if devices % sp:
            continue
        for engine, zero in space.weights:
            for optimizer in space.optimizers:
                for host in hosts:
                    yield Choice(
                        dp=devices // sp,
                        sp=sp,
                        strategy=strategy,
                        ulysses=inner,
                        engine=engine,
                        zero=zero,
                        optimizer=optimizer,
                        offload_optimizer=host,
                        lora_rank=space.lora_rank,
                    )


def _static_overflow(task: Task, group: Choice) -> Overflow | None:
    """Whether the states alone are too many: then no way to keep activations helps."""
    states, limits = states_of(task.profile, group), task.machine.tier_bytes()
    if states.fixed > limits["device"]:
        parts = {"weights": states.weights, "gradients": states.gradients, "optimizer": states.optimizer}
        return Overflow("device", states.fixed, limits["device"], max(parts, key=lambda name: parts[name]))
    if states.host > limits.get("host", 0.0):
        return Overflow("host", states.host, limits.get("host", 0.0), "optimizer states")
    return None


def _num_levers(choice: Choice) -> int:
    """What a plan adds to the plain way to train; what leans on more parts counts more."""
    on = (
        (1, choice.recompute),
        (1, choice.tiled_mlp),
        (1, choice.offload_activations != "none"),
        (2, choice.offload_optimizer != "none"),
        (2, choice.chunk != "none"),
        (3, choice.optimizer != "adamw"),
        (1, choice.engine != "fsdp2"),
        (1, choice.strategy == "hybrid"),
    )
    return sum(weight for weight, chosen in on if chosen)


def _is_tight(plan: Plan) -> bool:
    """A prediction is right within a few percent: a plan that leaves less room is worth less than a simple one."""
    return plan.footprint.device_bytes > _ROOMY * plan.device_limit


def _step_tokens(choice: Choice) -> int:
    """Lengths that every rule of layouts and chunks allows are multiples of this."""
    return lcm(1024, 2 * choice.sp, choice.chunk_tokens or 1)
