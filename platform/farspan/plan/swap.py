"""memory.swap_share=auto before a run: MEMO's program over the planner's bytes and seconds of a layer. Torch-free."""

from __future__ import annotations

import math
from dataclasses import replace

from farspan.activations.memo import LayerCost, choose_alpha, in_hundredths
from farspan.errors import PlanError
from farspan.plan.choice import Choice
from farspan.plan.cost import Task
from farspan.plan.duration import layer_seconds
from farspan.plan.states import states_of

# The last layer stays on the device.
_NUM_KEPT = 1


def with_share(task: Task, choice: Choice, asked: float | str) -> Choice:
    """`choice` with what `asked` (memory.swap_share) comes to; as it is unless layers are recomputed and offloaded."""
    if asked == 0 or not choice.recompute or choice.offload_activations == "none" or choice.chunk != "none":
        return choice
    share = predict_share(task, choice)[0] if isinstance(asked, str) else asked
    return replace(choice, swap_share=share)


def predict_share(task: Task, choice: Choice) -> tuple[float, str]:
    """(what a run would choose on this machine, why)."""
    layer, bytes_per_s, room = swap_cost(task, choice), _bytes_per_s(task), _room(task, choice)
    try:
        found = choose_alpha(layer, task.profile.num_layers, bytes_per_s, room, _NUM_KEPT)
    except PlanError as problem:
        return 0.0, f"memory.swap_share=auto is predicted to be refused: {problem}"
    share = in_hundredths(found.alpha)
    return share, (
        f"memory.swap_share=auto is predicted to be {share:g}: a layer's forward takes {layer.forward_s:.3g} s, copies "
        f"go at {bytes_per_s / 1e9:.3g} GB/s; {found.reason}"
    )


def swap_cost(task: Task, choice: Choice) -> LayerCost:
    """A layer of one rank, the mean over all of them, as a run measures it."""
    sharing = task.ways[choice.strategy, choice.sp, choice.ulysses]
    shard, num = task.tokens / choice.sp, task.profile.num_layers
    both = list(zip(task.profile.kinds, sharing, strict=True))
    forward_s, backward_s = layer_seconds(task.profile, choice, sharing, task.tokens, task.machine)
    return LayerCost(
        input_bytes=math.ceil(sum(kind.count * kind.boundary(shard) for kind, _ in both) / num),
        attention_bytes=math.ceil(sum(k.count * k.attention_out(shard) * share.q_factor for k, share in both) / num),
        rest_bytes=math.ceil(sum(kind.count * kind.products(shard) for kind, _ in both) / num),
        forward_s=forward_s,
        backward_s=backward_s,
    )


def _bytes_per_s(task: Task) -> float:
    """To the first tier below the device; a machine that states none computes in the memory it offloads to."""
    return task.machine.spill_bandwidth(next((name for name in task.machine.tier_bytes() if name != "device"), "host"))


def _room(task: Task, choice: Choice) -> int:
    tiers = task.machine.tier_bytes()
    below = sum(size for name, size in tiers.items() if name != "device") or tiers["device"]
    return int(max(0.0, below - states_of(task.profile, choice).host))
