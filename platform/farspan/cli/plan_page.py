"""What `farspan plan --gpu` prints: plans, the best one's bytes and time, what breaks first, and why not."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from farspan.plan.cost import Plan, Task
from farspan.plan.explain import breaks_first, head_layout, nearest_miss, reasons, seconds
from farspan.plan.machine import size_text
from farspan.plan.search import Found, Limit


def show_found(console: Console, task: Task, found: Found, limit: Limit | None, *, explain: bool, top: int) -> None:
    """Print everything for a reader."""
    profile, machine = task.profile, task.machine
    _line(console, "model", f"{profile.name}, {profile.num_parameters / 1e9:.2f} B parameters, {_layers(task)}")
    _line(console, "machine", machine.text())
    assumed = "measured" if machine.efficiency.measured else "assumed shares of the data sheet (measure: --calibrate)"
    _line(console, "speeds", assumed)
    _line(console, "sequence", f"{task.tokens:,} tokens, one document")
    if profile.max_positions is not None and profile.max_positions < task.tokens:
        _line(
            console,
            "positions",
            f"the model knows {profile.max_positions:,}: it needs scaled rotary positions",
            "yellow",
        )
    if found.best is not None:
        console.print()
        console.print(_plans_table(found.best_of_each_sharing()[:top]))
        _more(console, found, top)
        _best(console, task, found.best, limit)
    _refused(console, found, explain=explain)
    console.print()
    for line in head_layout(profile, found.best):
        _line(console, "heads", line)
    if not profile.quadratics:
        _line(console, "squares", "nothing the model keeps or makes grows with the square of the sequence")
    for item in profile.quadratics:
        _line(console, "squares", str(item), "yellow")


def _layers(task: Task) -> str:
    kinds = task.profile.kinds
    if len(kinds) == 1:
        return f"{kinds[0].count} layers of {kinds[0].name}"
    return f"{task.profile.num_layers} layers: " + ", ".join(f"{kind.count} {kind.name}" for kind in kinds)


def _plans_table(plans: list[Plan]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", expand=False)
    # A column of weights only where plans differ in it: at 80 characters the levers need the room.
    engines = {plan.choice.weights_text() for plan in plans} != {"fsdp2"}
    for name in ("", "sequence over", *(["weights"] if engines else []), "to save memory"):
        table.add_column(name, no_wrap=name != "to save memory", min_width=11 if name == "to save memory" else None)
    for name in ("device", "host", "step", "tokens/s", "MFU", "comm", "offload"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, plan in enumerate(plans, start=1):
        choice, time = plan.choice, plan.duration
        slower = sum(size for tier, size in plan.tiers.items() if tier != "device")
        comm = time.exchange_s + time.weights_s
        table.add_row(
            str(number),
            choice.sharing_text(),
            *([choice.weights_text()] if engines else []),
            choice.memory_text(),
            size_text(plan.tiers["device"]),
            size_text(slower) if slower else "-",
            _short(time.step_s),
            f"{plan.tokens_per_s:,.0f}",
            f"{plan.flops_utilization:.0%}",
            f"{comm / time.step_s:.1%}",
            f"{time.offload_s / time.step_s:.1%}",
            style="bold green" if number == 1 else None,
        )
    return table


def _more(console: Console, found: Found, top: int) -> None:
    ways = len(found.best_of_each_sharing())
    rest = f" ({ways - top} more: --top {ways})" if ways > top else ""
    console.print(Text(f"  best plan of each way to share a sequence{rest}; memory is of one device;", style="dim"))
    console.print(Text("  within 1% of the fastest, the plan that leans on the fewest parts comes first", style="dim"))


def _best(console: Console, task: Task, plan: Plan, limit: Limit | None) -> None:
    machine, time = task.machine, plan.duration
    available = machine.tier_bytes()["device"]
    console.print()
    used = f"{size_text(plan.footprint.device_bytes)} of {size_text(available)}"
    console.print(Text(f"plan 1, each device at its fullest ({plan.footprint.moment}): {used}", style="bold"))
    for name, size in sorted(plan.footprint.device.items(), key=lambda item: -item[1]):
        if size >= 0.001 * plan.footprint.device_bytes:
            bar = "█" * max(1, round(40 * size / available))
            console.print(Text.assemble(f"  {name:18}", f"{size_text(size):>9}  ", (bar, "cyan")))
    console.print()
    console.print(Text(f"a step of {plan.choice.dp * plan.tokens:,} tokens: {seconds(time.step_s)}", style="bold"))
    for name, value in (
        ("compute", time.compute_s),
        ("wait: attention", time.exchange_s),
        ("wait: weights", time.weights_s),
        ("wait: offload", time.offload_s),
        ("optimizer", time.optimizer_s),
    ):
        bar = "█" * round(40 * value / time.step_s)
        console.print(Text.assemble(f"  {name:18}", f"{seconds(value):>12}  ", (bar, "cyan")))
    console.print()
    if limit is not None:
        _line(console, "breaks", breaks_first(limit))
    settings = "  ".join(f"{key}={_yaml(value)}" for key, value in plan.choice.settings().items())
    _line(console, "settings", settings)


def _refused(console: Console, found: Found, *, explain: bool) -> None:
    console.print()
    num = f"{len(found.plans):,} plans fit, {len(found.rejected):,} do not"
    console.print(Text(num if found.rejected else f"{num}.", style="bold"))
    all_reasons = reasons(found.rejected)
    for reason in all_reasons if explain else all_reasons[:4]:
        console.print(Text(f"  {reason.count:>6,}  {reason.text}"))
        near = nearest_miss(reason)
        if near is not None:
            console.print(Text(f"          {near}", style="dim"))
    if not explain and len(all_reasons) > 4:
        console.print(Text(f"          {len(all_reasons) - 4} more reasons with --explain", style="dim"))


def _line(console: Console, what: str, text: str, style: str | None = None) -> None:
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(width=10, no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(Text(f"{what}", style="dim"), Text(text, style=style or ""))
    console.print(table)


def _short(time_s: float) -> str:
    """A time in six characters."""
    if time_s >= 3600:
        return f"{time_s // 3600:.0f}h{time_s % 3600 // 60:02.0f}m"
    if time_s >= 60:
        return f"{time_s // 60:.0f}m{time_s % 60:02.0f}s"
    return seconds(time_s)


def _yaml(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
