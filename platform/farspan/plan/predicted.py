"""A prediction held against what was measured. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from farspan.plan.cost import Plan
from farspan.plan.explain import seconds
from farspan.plan.machine import size_text


@dataclass(frozen=True, slots=True)
class Comparison:
    """One number that was predicted and measured."""

    what: str
    predicted: float
    measured: float
    unit: str

    @property
    def error(self) -> float:
        """How much more was predicted than measured, as a share of what was measured."""
        return (self.predicted - self.measured) / self.measured

    def line(self) -> tuple[str, str]:
        """(what, text) for a report."""
        show = size_text if self.unit == "bytes" else seconds if self.unit == "s" else _count
        text = f"{show(self.measured)} measured, {show(self.predicted)} predicted ({self.error:+.0%})"
        return self.what, text


def predicted_against_measured(
    plan: Plan, peak_bytes: float | None = None, step_s: float | None = None
) -> list[Comparison]:
    """The plan of a run against its largest device memory and its median step; what was not measured is left out.

    `peak_bytes` is what tensors held at most (`torch.cuda.max_memory_allocated`): what an allocator loses between
    them is predicted, but not part of it.
    """
    found = []
    if peak_bytes is not None and peak_bytes > 0:
        tensors = sum(size for name, size in plan.footprint.device.items() if name != "allocator slack")
        found.append(Comparison("device memory", tensors, peak_bytes, "bytes"))
    if step_s is not None and step_s > 0:
        found.append(Comparison("step time", plan.step_s, step_s, "s"))
        tokens = plan.choice.dp * plan.tokens
        found.append(Comparison("tokens per second", plan.tokens_per_s, tokens / step_s, "count"))
    return found


def _count(value: float) -> str:
    return f"{value:,.0f}"
