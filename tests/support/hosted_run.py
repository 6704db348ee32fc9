"""Training runs whose driver lives on the head's host, and what they are held against."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tests.support.ray_hosts import Process, RayHosts
from tests.support.runs import Curve, curve, tiny_run

from farspan.config.load import dump_config
from farspan.config.schema import RunConfig
from farspan.models.checkpoint import make_config
from farspan.plan.facts import model_facts
from farspan.plan.run_plan import plan_run
from farspan.telemetry.events import Event, EventBody, StepReport, read_events
from farspan.train.build import build
from farspan.train.loop import train
from farspan.train.outside import NothingOutside

STEPS = 6
TRAIN = "farspan-train"
# Each node has one of them: whoever asks for it gets a node of its own; otherwise Ray packs both on one.
APART = f"resources.custom={{{TRAIN}: 1}}"


@dataclass
class HostedRun:
    """A run, and the process that drives it."""

    config: RunConfig
    driver: Process

    @property
    def events(self) -> list[Event]:
        file = Path(self.config.output) / "events.jsonl"
        return list(read_events(file).events) if file.exists() else []

    def finished(self) -> Curve:
        """Its curve, when it is done."""
        code, text = self.driver.end()
        assert code == 0, text
        return curve([event.body for event in self.events])


def two_workers(cluster: RayHosts, corpus: str, name: str, *more: str) -> RunConfig:
    return tiny_run(corpus, str(cluster.folder / name), "parallel.workers=2", f"train.steps={STEPS}", *more)


def start_run(cluster: RayHosts, config: RunConfig) -> HostedRun:
    name = Path(config.output).name
    file = cluster.folder / f"{name}.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    return HostedRun(config, cluster.farspan(0, "train", str(file), "--join", log=f"{name}.log"))


def sent_bytes(config: RunConfig) -> int:
    """What the plan says a rank sends to the other one in forward and backward of the whole run."""
    facts = model_facts(make_config("llama", {**config.model.settings, "vocab_size": 300}))
    return plan_run(config, facts, compute_bytes=8).exchange_bytes_per_step * config.train.steps


class UntilStep(NothingOutside):
    """Wants a run to stop after some step."""

    def __init__(self, last: int) -> None:
        self._last, self._seen = last, 0

    def __call__(self, body: EventBody) -> None:
        self._seen = body.step if isinstance(body, StepReport) else self._seen

    def notice(self) -> str | None:
        return "enough" if self._seen >= self._last else None


def curve_here(config: RunConfig, cache: str, last: int) -> Curve:
    """At least the first `last` steps of a run, on this rank alone."""
    events: list[EventBody] = []
    outside = UntilStep(last)

    def tell(body: EventBody) -> None:
        outside(body)
        events.append(body)

    train(build(config, torch.device("cpu"), Path(cache)), config, tell, outside)
    return curve(events)
