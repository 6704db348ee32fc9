"""The run report: one HTML file that needs nothing but itself.

What the events say, in the order a reader asks: how it went, the curves, the requests, and at the end every event as
it was written, so that no number is lost to rounding. Of a long run some steps stand for all, and the page says so.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from farspan.errors import UnreachableError
from farspan.telemetry.cost import price_per_million
from farspan.telemetry.kinds import (
    CheckpointPublished,
    Event,
    LayoutProbed,
    Note,
    PlanPredicted,
    PlanSteppedDown,
    RequestServed,
    RunFailed,
    RunFinished,
    RunPreempted,
    RunResized,
    RunRestarted,
    RunStarted,
    StepReport,
    to_json,
)
from farspan.telemetry.names import metric
from farspan.telemetry.plots import Plot, draw
from farspan.telemetry.summary import Summary, percentile, summarize
from farspan.telemetry.tiers import BESIDE_DEVICE, held_beside
from farspan.telemetry.units import byte_scale, byte_size, count, duration, number, plural, time_scale

TEMPLATE = "report.html.jinja"
Style = Callable[[float], str]
_MOST_STEPS = 2000
"""In the tables: a browser still opens them, and a run of a week has hundreds of thousands."""


def write_report(events: Sequence[Event], out: Path, title: str, facts: Mapping[str, str] | None = None) -> Path:
    """Write the report of `events` to `out` and return it.

    `facts` are what events cannot know, shown in the header in their order: model, machine, date, version.

    Raises:
        UnreachableError: `out` cannot be written; an older report stays as it was.
    """
    page = render_report(events, title, facts or {})
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.unfinished")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # The name of a file need not be text.
        unfinished.write_text(page, encoding="utf-8", errors="backslashreplace")
        unfinished.replace(out)
    except OSError as problem:
        raise UnreachableError(str(out), f"the report cannot be written ({problem.strerror})") from None
    finally:
        # Also after an interrupt; once it has its name it is no longer there.
        with suppress(OSError):
            unfinished.unlink()
    return out


def render_report(events: Sequence[Event], title: str, facts: Mapping[str, str]) -> str:
    """The report as HTML."""
    summary = summarize(events)
    shown = _thinned(summary.steps)
    written = events if len(shown) == len(summary.steps) else _without_others(events, shown)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("farspan.telemetry").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(
        title=title,
        facts=facts,
        summary=summary,
        # A record of training alone was never meant to hold a request.
        about_serving=bool(summary.requests) or (summary.started is None and not summary.steps),
        status=_status(summary),
        train_tiles=[*_train_tiles(summary), *_price_tiles(summary), *_predicted_tiles(summary)],
        serve_tiles=_serve_tiles(summary),
        # The SVG is ours and escapes what it was given; everything else is escaped by the template.
        train_plots=[(plot.title, Markup(draw(plot))) for plot in _train_plots(summary)],
        serve_plots=[(plot.title, Markup(draw(plot))) for plot in _serve_plots(summary)],
        requests=[_request_row(request) for request in summary.requests],
        timeline=[_timeline_row(event) for event in events if not isinstance(event.body, StepReport)],
        steps=[_step_row(step) for step in shown],
        steps_shown=_shown(len(shown), len(summary.steps)),
        record="\n".join(to_json(event) for event in written),
        events_shown=_shown(len(written), len(events)),
    )


def _thinned(steps: Sequence[StepReport]) -> Sequence[StepReport]:
    """At most about _MOST_STEPS of them, evenly, the last one always."""
    stride = max(1, math.ceil(len(steps) / _MOST_STEPS))
    return [step for i, step in enumerate(steps, start=1) if i % stride == 1 % stride or i == len(steps)]


def _without_others(events: Sequence[Event], shown: Sequence[StepReport]) -> Sequence[Event]:
    """Every event but the steps that are not `shown`."""
    numbers = {step.step for step in shown}
    return [event for event in events if not isinstance(event.body, StepReport) or event.body.step in numbers]


def _shown(some: int, all_: int) -> str:
    return number(all_) if some == all_ else f"{number(some)} of {number(all_)}"


def _status(summary: Summary) -> tuple[str, str]:
    """A class for the style sheet and a sentence for the reader."""
    if summary.bad_steps:
        listed = ", ".join(str(step) for step in summary.bad_steps[:5]) + (", …" if len(summary.bad_steps) > 5 else "")
        return "bad", f"Loss or gradient norm was not finite at step {listed}"
    match summary.ended:
        case RunFailed(reason=reason):
            return "bad", f"Failed after {plural(len(summary.steps), 'step')}: {reason}"
        case RunPreempted(step=step):
            return "warn", f"Stopped after step {step}; the next start goes on from its checkpoint"
        case RunFinished(seconds=seconds):
            return "good", f"Finished in {duration(seconds)}"
        case None if summary.started is not None:
            return "warn", f"Not finished: the record ends after {plural(len(summary.steps), 'step')}"
        case None:
            return "plain", "No training in this record"


def _train_tiles(summary: Summary) -> list[tuple[str, str, str]]:
    """(label, value, remark) of the numbers a reader wants first."""
    if not summary.steps:
        return []
    first, last = summary.steps[0], summary.steps[-1]
    return [
        ("Final loss", number(last.loss, 4), f"from {number(first.loss, 4)}, in nats"),
        ("Steps", number(len(summary.steps)), f"{duration(math.fsum(s.step_s for s in summary.steps))} in steps"),
        ("Tokens", count(summary.tokens), f"{number(summary.tokens)} in all"),
        ("Throughput", count(summary.tokens_per_s), f"tokens/s, {count(summary.tokens_per_worker_s)} per worker"),
        ("Peak memory", byte_size(summary.peak_memory_bytes), "of the fullest rank"),
        ("Sent between ranks", byte_size(sum(s.bytes_sent for s in summary.steps)), "to exchange attention"),
        *_exposed_tiles(summary),
        *_tier_tiles(summary),
    ]


def _exposed_tiles(summary: Summary) -> list[tuple[str, str, str]]:
    """What communication cost in time, where ranks waited at all."""
    seconds = math.fsum(step.step_s for step in summary.steps)
    waited, most = (math.fsum(getattr(s, name) for s in summary.steps) for name in ("exposed_s", "exposed_max_s"))
    if seconds <= 0 or most <= 0:
        return []
    remark = f"of the steps' time, mean over ranks; {most / seconds:.1%} by each step's worst"
    return [("Exposed communication", f"{waited / seconds:.1%}", remark)]


def _tier_tiles(summary: Summary) -> list[tuple[str, str, str]]:
    """The tiers beside the device that held something."""
    return [
        (f"Held in {name}", byte_size(most), "by the fullest rank")
        for field, name in BESIDE_DEVICE.items()
        if (most := max(getattr(step, field) for step in summary.steps)) > 0
    ]


def _price_tiles(summary: Summary) -> list[tuple[str, str, str]]:
    """What it cost, where the config says what a device does, and how well devices were used, where that is known."""
    tiles = []
    used = [step.utilization for step in summary.steps if step.utilization > 0]
    if used:
        tiles.append(("Utilization", f"{percentile(used, 50):.1%}", "of the devices' peak, median step"))
    price = summary.run.price_per_worker_hour
    if price > 0 and summary.tokens_per_worker_s > 0:
        remark = f"at {number(price)} for a device's hour; {number(summary.cost)} for these steps"
        per_million = price_per_million(price, 1, summary.tokens_per_worker_s)
        tiles.append(("Price of a million tokens", number(per_million), remark))
    return tiles


def _predicted_tiles(summary: Summary) -> list[tuple[str, str, str]]:
    """What the planner said beside what was measured, by the median step: the first ones set things up."""
    said, steps = summary.predicted, summary.as_predicted
    if said is None or not steps:
        return []
    pairs: list[tuple[str, float, float, Style]] = [
        ("step", said.step_s, percentile([s.step_s for s in steps], 50), duration)
    ]
    if said.device_bytes:
        pairs.append(("memory", said.device_bytes, max(s.peak_memory_bytes for s in steps), byte_size))
    return [
        (
            f"Predicted {what}",
            f"{(plan - found) / found:+.0%}",
            f"{style(plan)} predicted, {style(found)} measured",
        )
        for what, plan, found, style in pairs
        if found > 0
    ]


def _serve_tiles(summary: Summary) -> list[tuple[str, str, str]]:
    if not summary.requests:
        return []
    ttft = [request.ttft_s for request in summary.requests]
    gaps = summary.inter_token_s
    recovered = sum(request.recovered for request in summary.requests)
    return [
        ("Requests", number(len(summary.requests)), f"{number(recovered)} recovered after a lost worker"),
        ("Time to first token", duration(percentile(ttft, 50)), f"p50; p99 {duration(percentile(ttft, 99))}"),
        ("Inter-token latency", duration(percentile(gaps, 50)), f"p50; p99 {duration(percentile(gaps, 99))}"),
        ("KV moved", byte_size(sum(r.kv_bytes for r in summary.requests)), "from prefill to decode"),
    ]


def _train_plots(summary: Summary) -> list[Plot]:
    x = [step.step for step in summary.steps]
    plots = []
    for name, style, from_zero in _TRAIN_CURVES if x else ():
        y = [float(getattr(step, name)) for step in summary.steps]
        if name in _ONLY_WHERE_USED and not any(y):
            continue
        what = metric(f"step.{name}")
        plots.append(_plot(f"plot-{name}", what.label, what.unit, style, "step", x, y, len(x), from_zero=from_zero))
    return plots


def _serve_plots(summary: Summary) -> list[Plot]:
    plots = []
    for name, suffix, value in _REQUEST_BARS if summary.requests else ():
        # A request with one output token has no gap between tokens: its place stays empty.
        points = [(i, y) for i, r in enumerate(summary.requests, 1) if not math.isnan(y := value(r))]
        x, heights = [i for i, _ in points], [y for _, y in points]
        what = metric(f"request_served.{name}")
        label, num_x = what.label + suffix, len(summary.requests)
        plots.append(
            _plot(f"plot-{name}", label, what.unit, duration, "request", x, heights, num_x, kind="bars", from_zero=True)
        )
    return plots


_TRAIN_CURVES: tuple[tuple[str, Style, bool], ...] = (
    ("loss", number, False),
    ("tokens_per_s", count, True),
    ("peak_memory_bytes", byte_size, True),
    ("exposed_s", duration, True),
    ("device_bytes", byte_size, True),
    *((field, byte_size, True) for field in BESIDE_DEVICE),
)
_ONLY_WHERE_USED = {"exposed_s", "device_bytes", *BESIDE_DEVICE}
_REQUEST_BARS: tuple[tuple[str, str, Callable[[RequestServed], float]], ...] = (
    ("ttft_s", "", lambda request: request.ttft_s),
    ("inter_token_s", ", median", lambda request: percentile(request.inter_token_s, 50)),
    ("transfer_s", "", lambda request: request.transfer_s),
)


def _plot(
    id: str, label: str, unit: str, style: Style, x_label: str, x: list[int], y: list[float], num_x: int, **look: Any
) -> Plot:
    """A plot whose y axis is in the unit that fits its largest value."""
    largest = max((abs(value) for value in y if math.isfinite(value)), default=0.0)
    scale, shown = {"bytes": byte_scale, "s": time_scale}.get(unit, lambda _: (1.0, unit))(largest)
    return Plot(
        id=id,
        title=f"{label}, {shown}",
        description=_describe(label, y, style, plural(len(x), x_label)),
        x_label=x_label,
        x=x,
        y=[value / scale for value in y],
        num_x=num_x,
        **look,
    )


def _describe(label: str, values: Sequence[float], style: Style, over: str) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return f"{label} over {over}: no finite value."
    missing = len(values) - len(finite)
    remark = f" {missing} values are not finite and are marked." if missing else ""
    return (
        f"{label} over {over}: first {style(values[0])}, last {style(values[-1])}, "
        f"lowest {style(min(finite))}, highest {style(max(finite))}.{remark}"
    )


def _request_row(request: RequestServed) -> dict[str, str]:
    return {
        "request": request.request_id,
        "prompt": number(request.prompt_tokens),
        "output": number(request.output_tokens),
        "ttft": duration(request.ttft_s),
        "p50": duration(percentile(request.inter_token_s, 50)) if request.inter_token_s else "–",
        "p99": duration(percentile(request.inter_token_s, 99)) if request.inter_token_s else "–",
        "kv": byte_size(request.kv_bytes),
        "transfer": duration(request.transfer_s),
        "transport": request.transport,
        "recovered": "yes" if request.recovered else "no",
    }


def _step_row(step: StepReport) -> list[str]:
    return [
        str(step.step), number(step.loss, 5), number(step.learning_rate), number(step.grad_norm),
        number(step.tokens), number(step.num_labels), duration(step.step_s), number(step.tokens_per_s),
        byte_size(step.peak_memory_bytes), byte_size(step.device_bytes),
        ", ".join(f"{tier} {byte_size(size)}" for tier, size in held_beside(step).items()) or "–",
        byte_size(step.bytes_sent), duration(step.exposed_s), duration(step.exposed_max_s),
    ]  # fmt: skip


def _timeline_row(event: Event) -> tuple[str, str, str]:
    """(date and clock time in UTC, what, detail)."""
    clock = datetime.fromtimestamp(event.time_s, tz=UTC).strftime("%Y-%m-%d %H:%M:%S")
    match event.body:
        case RunStarted():
            return clock, "Run started", ""
        case CheckpointPublished(step=step, uri=uri, seconds=seconds, bytes=size):
            return clock, f"Checkpoint at step {step}", f"{uri} · {byte_size(size)} in {duration(seconds)}"
        case LayoutProbed(step=step, seconds=seconds, failed=failed, passed=passed):
            verdict = "FAILED: " + "; ".join(failed) if failed else "equal: " + "; ".join(passed)
            return clock, f"Layout probed after step {step}", f"{verdict} · {duration(seconds)}"
        case PlanPredicted(step_s=step_s, device_bytes=size):
            memory = f" · {byte_size(size)} on the fullest rank" if size else ""
            return clock, "Plan", f"{duration(step_s)} a step predicted{memory}"
        case PlanSteppedDown(step=step, reason=reason, change=change):
            return clock, f"Step {step} did not fit", f"{reason} · now {change}"
        case RunRestarted(step=step, redone=redone, reason=reason):
            where = f"after step {step}" if step > 0 else "from the beginning"
            return clock, f"Restarted {where}", f"{plural(redone, 'step')} done again · {reason}"
        case RunPreempted(step=step, reason=reason):
            return clock, f"Stopped after step {step}", f"a checkpoint was published · {reason}"
        case RunResized(step=step, workers=workers, accumulation=accumulation, reason=reason):
            detail = f"accumulation {accumulation} · {reason}"
            return clock, f"{plural(workers, 'worker')} from step {step + 1}", detail
        case RunFailed(reason=reason):
            return clock, "Run failed", reason
        case RunFinished(steps=steps, tokens=tokens, seconds=seconds):
            detail = f"{plural(steps, 'step')} · {plural(tokens, 'token')} · {duration(seconds)}"
            return clock, "Run finished", detail
        case RequestServed(request_id=name, output_tokens=tokens):
            return clock, "Request served", f"{name} · {plural(tokens, 'token')}"
        case Note(text=text):
            return clock, "Note", text
        case StepReport(step=step, loss=loss):
            return clock, f"Step {step}", f"loss {number(loss)}"
