"""What happened in a run, as lines of JSON: the one record from which reports are made.

A line is `{"schema": 1, "time_s": <Unix seconds>, "kind": "step", "fields": {...}}`. JSON has no NaN and no infinity,
so those floats are written as the strings "NaN", "Infinity" and "-Infinity" and come back as floats.
"""

from __future__ import annotations

import json
import math
import types
import typing
from dataclasses import MISSING, dataclass, fields
from typing import Any

from farspan.errors import CorruptDataError

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """The first event of a run."""

    config: str
    """The resolved config as YAML."""
    plan: str
    """What will run where, as text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step, summed or averaged over all ranks."""

    step: int
    """Counts from 1."""
    loss: float
    """Mean over `num_labels`, in nats: cross entropy, with label smoothing and z-loss where those are set."""
    learning_rate: float
    grad_norm: float
    """Global L2 norm before clipping."""
    tokens: int
    num_labels: int
    step_s: float
    tokens_per_s: float
    peak_memory_bytes: int
    """Of the rank that used most."""
    bytes_sent: int
    """By all ranks together, to exchange attention."""
    model_flops: float = 0.0
    """Operations the step cannot do without (train.useful); 0: not known for this model."""
    utilization: float = 0.0
    """Their share of what all devices could do in that time; 0: their peak is not known."""
    device_bytes: int = 0
    """On the device, by the rank that uses most: the step's peak on CUDA; on a CPU all memory of the process that is
    resident at the end of the step, its DRAM tiers too. 0: not known."""
    dram_bytes: int = 0
    """Held in DRAM at the end of the step, by the rank that holds most: by an offloaded optimizer, and what its DRAM
    tiers gave to offloaded activations or to the arena of chunks, in use or kept for the next step."""
    cxl_bytes: int = 0
    """The same of its CXL tiers."""
    emulated_cxl_bytes: int = 0
    """The same of emulated ones: DRAM whose speed is made up."""
    nvme_bytes: int = 0
    """The same of its NVMe tiers."""
    exposed_s: float = 0.0
    """Time of the step in which a rank stood still for others, mean over ranks: for what attention and recurrent layers
    exchange, for the number of labels, draws of chunks, and the loss. What travels while something is computed does not
    count, nor what the engine of weights waits for (gathering weights, summing gradients, their norm)."""
    exposed_max_s: float = 0.0
    """The same of the rank that stood still longest."""
    samples: str = ""
    """Hash of every sequence the run has consumed up to and with this step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPublished:
    """A checkpoint became visible under `uri`."""

    step: int
    uri: str
    seconds: float
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutProbed:
    """The running layout was held against one plain process, with the live weights."""

    step: int
    seconds: float
    failed: tuple[str, ...]
    """One sentence per check: what, how much, the bound."""
    passed: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished:
    """The last event of a run that came to its end; a run without it was stopped or died."""

    steps: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestServed:
    """One answered request."""

    request_id: str
    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    """Arrival to first token."""
    inter_token_s: tuple[float, ...]
    """Gaps between output tokens: output_tokens - 1 of them when all were streamed."""
    kv_bytes: int
    """KV pages moved from prefill to decode; 0 when both were one worker."""
    transfer_s: float
    transport: str
    recovered: bool
    """The answer survived the loss of a worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something worth a sentence in the report."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanPredicted:
    """What the planner expects of every step."""

    step_s: float
    device_bytes: int
    """Of tensors on the fullest rank; 0: not predicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSteppedDown:
    """A rank ran out of memory; the run goes on from the same batch with a plan that needs less."""

    step: int
    """The step that did not fit; 0: what comes before the first."""
    reason: str
    """Which rank, and what it said."""
    change: str
    """What the new plan does differently."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRestarted:
    """Workers were lost; the run goes on from what was published last."""

    step: int
    """Steps done where it goes on; 0: from the beginning."""
    redone: int
    """Steps that had been told of and are done again."""
    reason: str
    restarts: int = 0
    """How often its driver has started it again, this time included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPreempted:
    """The run was asked to stop, published a checkpoint and ended; the next start goes on from it."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFailed:
    """The run was ended by an error or an interrupt; what it published before stays."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResized:
    """The run goes on with another number of workers and the same sequences in each step."""

    step: int
    """Steps done when the size changed."""
    workers: int
    accumulation: int
    reason: str


EventBody = (
    RunStarted
    | StepReport
    | CheckpointPublished
    | LayoutProbed
    | RunFinished
    | RequestServed
    | PlanPredicted
    | PlanSteppedDown
    | RunRestarted
    | RunPreempted
    | RunFailed
    | RunResized
    | Note
)

KINDS: dict[str, type[EventBody]] = {
    "run_started": RunStarted,
    "step": StepReport,
    "checkpoint_published": CheckpointPublished,
    "layout_probed": LayoutProbed,
    "run_finished": RunFinished,
    "request_served": RequestServed,
    "plan_predicted": PlanPredicted,
    "plan_stepped_down": PlanSteppedDown,
    "run_restarted": RunRestarted,
    "run_preempted": RunPreempted,
    "run_failed": RunFailed,
    "run_resized": RunResized,
    "note": Note,
}


@dataclass(frozen=True, slots=True)
class Event:
    """What happened, and when (Unix seconds)."""

    time_s: float
    body: EventBody

    @property
    def kind(self) -> str:
        return next(name for name, cls in KINDS.items() if type(self.body) is cls)


def to_json(event: Event) -> str:
    """One line without its newline; `from_json` gives the same event back, bit for bit."""
    values = {f.name: _encode(getattr(event.body, f.name)) for f in fields(event.body)}
    line = {"schema": SCHEMA_VERSION, "time_s": _encode(event.time_s), "kind": event.kind, "fields": values}
    return json.dumps(line, allow_nan=False, separators=(",", ":"))


def from_json(line: str, origin: str = "event") -> Event:
    """The event of one line; `origin` (file and line) is named when it cannot be read.

    Raises:
        CorruptDataError: not JSON, another schema, an unknown kind, a missing, extra or wrongly typed field.
    """
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as problem:
        raise CorruptDataError(origin, f"is not a line of JSON ({problem})") from None
    if not isinstance(record, dict) or set(record) != {"schema", "time_s", "kind", "fields"}:
        raise CorruptDataError(origin, "must be an object with schema, time_s, kind and fields")
    if type(record["schema"]) is not int or record["schema"] != SCHEMA_VERSION:
        raise CorruptDataError(origin, f"has schema {record['schema']!r}, this farspan reads {SCHEMA_VERSION}")
    kind = record["kind"]
    body_type = KINDS.get(kind) if isinstance(kind, str) else None
    if body_type is None:
        raise CorruptDataError(origin, f"has unknown kind {kind!r}; known: {', '.join(KINDS)}")
    time_s = _decode(record["time_s"], float, f"{origin}: time_s")
    return Event(time_s, _decode_body(record["fields"], body_type, origin))


def _decode_body(values: Any, body_type: type[EventBody], origin: str) -> EventBody:
    hints = typing.get_type_hints(body_type)
    # A record that was begun before a number was added does not have it.
    required = {f.name for f in fields(body_type) if f.default is MISSING}
    if not isinstance(values, dict) or not required <= set(values) <= set(hints):
        raise CorruptDataError(origin, f"{body_type.__name__} must have exactly the fields {', '.join(hints)}")
    return body_type(**{name: _decode(value, hints[name], f"{origin}: {name}") for name, value in values.items()})


def _encode(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def _decode(value: Any, hint: Any, origin: str) -> Any:
    if isinstance(hint, types.GenericAlias):
        if not isinstance(value, list):
            raise CorruptDataError(origin, f"must be a list, got {value!r}")
        return tuple(_decode(item, hint.__args__[0], origin) for item in value)
    if hint is float:
        if value in ("NaN", "Infinity", "-Infinity") or type(value) is int:
            return float(value)
        if type(value) is float and math.isfinite(value):
            return value
    elif type(value) is hint:
        return value
    raise CorruptDataError(origin, f"must be {hint.__name__}, got {value!r}")
