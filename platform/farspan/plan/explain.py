"""What the planner found, in words and plain numbers for people and programs. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from farspan.plan.cost import Overflow, Plan, Task
from farspan.plan.machine import size_text
from farspan.plan.profile import ModelProfile
from farspan.plan.search import Found, Limit, Rejected


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a number of choices were refused; `nearest` is the one that came closest."""

    text: str
    count: int
    nearest: Rejected


def reasons(rejected: Iterable[Rejected]) -> list[Reason]:
    """Refusals by what they have in common: what does not fit first, then what is against a rule; by number."""
    groups: dict[str, list[Rejected]] = {}
    for item in rejected:
        groups.setdefault(_kind(item.reason), []).append(item)
    found = [Reason(text, len(items), min(items, key=_excess)) for text, items in groups.items()]
    return sorted(found, key=lambda reason: (not isinstance(reason.nearest.reason, Overflow), -reason.count))


def nearest_miss(reason: Reason) -> str | None:
    """The refusal that came closest, in one line; none for a rule, which has no nearly."""
    why, choice = reason.nearest.reason, reason.nearest.choice
    if not isinstance(why, Overflow):
        return None
    over = size_text(why.bytes - why.limit)
    saves = "nothing to save memory" if choice.memory_text() == "-" else choice.memory_text()
    return f"nearest: {over} too much with {choice.sharing_text()}, {saves}"


def head_layout(profile: ModelProfile, chosen: Plan | None) -> list[str]:
    """Chunk-wise training against recomputing layers, from the model's own heads."""
    if profile.recurrent or not profile.num_layers:
        return ["chunk-wise training (SeCO) is out: recurrent layers have no keys and values to keep"]
    layers = profile.num_layers
    arena, inputs = profile.arena_bytes / layers, profile.checkpoint_bytes / layers
    ratio = arena / inputs
    says = (
        f"SeCO keeps {1 / ratio:.1f}x less" if ratio < 0.95 else f"SeCO keeps {ratio:.1f}x more" if ratio > 1.05
        else "they keep the same"
    )  # fmt: skip
    lines = [f"SeCO keeps {arena:,.0f} bytes of a token and layer (8 Hkv d), recompute {inputs:,.0f} (2 h): {says}"]
    if chosen is not None and chosen.choice.chunk != "none":
        lines.append("SeCO was chosen: only one chunk is at work at a time, which outweighs a second forward")
    return lines


def breaks_first(limit: Limit) -> str:
    """What ends a plan when sequences grow."""
    if limit.breaks is None:
        return f"nothing up to {limit.longest_tokens:,} tokens"
    return f"beyond {limit.longest_tokens:,} tokens {limit.breaks}"


def plan_dict(plan: Plan) -> dict[str, Any]:
    """A plan for a program."""
    time = plan.duration
    return {
        "settings": plan.choice.settings(),
        "swap_share": plan.choice.swap_share,
        "dp": plan.choice.dp,
        "sequence_tokens": plan.tokens,
        "tiers_bytes": {name: round(size) for name, size in plan.tiers.items()},
        "device_bytes_at": plan.footprint.moment,
        "device_buffers_bytes": {name: round(size) for name, size in plan.footprint.device.items()},
        "step_s": time.step_s,
        "tokens_per_s": plan.tokens_per_s,
        "flops_utilization": plan.flops_utilization,
        "compute_s": time.compute_s,
        "exposed_exchange_s": time.exchange_s,
        "exposed_weights_s": time.weights_s,
        "exposed_offload_s": time.offload_s,
        "optimizer_s": time.optimizer_s,
    }


def report_dict(task: Task, found: Found, limit: Limit | None, top: int) -> dict[str, Any]:
    """Everything `farspan plan --json` prints."""
    profile = task.profile
    return {
        "model": profile.name,
        "num_parameters": profile.num_parameters,
        "machine": task.machine.text(),
        "measured": task.machine.efficiency.measured,
        "num_plans": len(found.plans),
        "num_rejected": len(found.rejected),
        "plans": [plan_dict(plan) for plan in found.plans[:top]],
        "rejected": [
            {"reason": reason.text, "count": reason.count, "nearest": nearest_miss(reason)}
            for reason in reasons(found.rejected)
        ],
        "breaks_first": None
        if limit is None
        else {"longest_tokens": limit.longest_tokens, "reason": None if limit.breaks is None else str(limit.breaks)},
        "quadratic": [str(item) for item in profile.quadratics],
    }


def seconds(time_s: float) -> str:
    """A time for a reader."""
    if time_s < 1:
        return f"{time_s * 1e3:.0f} ms"
    if time_s < 60:
        return f"{time_s:.1f} s"
    if time_s < 3600:
        return f"{time_s // 60:.0f} min {time_s % 60:.0f} s"
    return f"{time_s // 3600:.0f} h {time_s % 3600 / 60:.0f} min"


def _kind(reason: str | Overflow) -> str:
    if isinstance(reason, Overflow):
        where = "device memory" if reason.tier == "device" else f"{reason.tier} memory"
        return f"{where} overflows, most is {reason.largest}"
    return reason


def _excess(item: Rejected) -> float:
    return item.reason.bytes - item.reason.limit if isinstance(item.reason, Overflow) else 0.0
