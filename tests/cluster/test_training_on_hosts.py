"""Training whose processes live on different hosts equals training in one process, also when a host is lost.

Each host takes its own name for loopback, as Debian installs it, and nothing tells gloo which interface to use.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.support.corpus import small_corpus
from tests.support.ranks import RankPool
from tests.support.ray_hosts import START_S, Process, RayHosts, ray_on_hosts, wait_until
from tests.support.runs import Curve, curve, tiny_run

from farspan.config.load import dump_config
from farspan.config.schema import RunConfig
from farspan.models.checkpoint import make_config
from farspan.plan.facts import model_facts
from farspan.plan.run_plan import plan_run
from farspan.telemetry.events import Event, EventBody, RunResized, RunRestarted, StepReport, read_events
from farspan.train.build import build
from farspan.train.loop import train
from farspan.train.outside import NothingOutside

STEPS = 6
# Whoever asks for two CPUs of nodes with two gets a node of its own.
APART, TOGETHER = "resources.cpus_per_worker=2", "resources.cpus_per_worker=1"
# Issue: recovery from the moment the link is cut.
RECOVERED_S = 30.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayHosts]:
    with ray_on_hosts({"CPU": 2}, {"CPU": 2}, own_name_is_loopback=True) as found:
        yield found


@pytest.fixture(scope="module")
def corpus(cluster: RayHosts) -> str:
    return small_corpus(cluster.folder)


class UntilStep(NothingOutside):
    """Wants a run to stop after some step."""

    def __init__(self, last: int) -> None:
        self._last, self._seen = last, 0

    def __call__(self, body: EventBody) -> None:
        self._seen = body.step if isinstance(body, StepReport) else self._seen

    def notice(self) -> str | None:
        return "enough" if self._seen >= self._last else None


def curve_here(config: RunConfig, cache: str, last: int) -> Curve:
    """The first steps of a run on one rank."""
    events: list[EventBody] = []
    outside = UntilStep(last)

    def tell(body: EventBody) -> None:
        outside(body)
        events.append(body)

    train(build(config, torch.device("cpu"), Path(cache)), config, tell, outside)
    return curve(events)


@dataclass
class HostedRun:
    """A run whose driver lives on the head's host."""

    config: RunConfig
    driver: Process

    @property
    def events(self) -> list[Event]:
        file = Path(self.config.output) / "events.jsonl"
        return list(read_events(file).events) if file.exists() else []

    def steps(self) -> dict[int, float]:
        """When each step was first told of."""
        told: dict[int, float] = {}
        for event in self.events:
            if isinstance(event.body, StepReport):
                told.setdefault(event.body.step, event.time_s)
        return told


def start(cluster: RayHosts, config: RunConfig) -> HostedRun:
    name = Path(config.output).name
    file = cluster.folder / f"{name}.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    return HostedRun(config, cluster.farspan(0, "train", str(file), "--join", log=f"{name}.log"))


def finished(run: HostedRun) -> Curve:
    code, text = run.driver.end()
    assert code == 0, text
    return curve([event.body for event in run.events])


def sent_bytes(config: RunConfig) -> int:
    """What the plan says a rank sends to the other one in forward and backward of the whole run."""
    facts = model_facts(make_config("llama", {**config.model.settings, "vocab_size": 300}))
    return plan_run(config, facts, compute_bytes=8).exchange_bytes_per_step * config.train.steps


def two_workers(cluster: RayHosts, corpus: str, name: str, *more: str) -> RunConfig:
    return tiny_run(corpus, str(cluster.folder / name), "parallel.workers=2", f"train.steps={STEPS}", *more)


def test_a_sequence_shared_by_two_hosts_is_learnt_as_by_one_process(
    cluster: RayHosts, corpus: str, ranks: RankPool, tmp_path: Path
) -> None:
    config = two_workers(cluster, corpus, "apart", "parallel.sp=2", "parallel.strategy=ring", APART)
    alone = tiny_run(corpus, str(tmp_path / "alone"), f"train.steps={STEPS}")
    (want,) = ranks.run(curve_here, 1, alone, str(tmp_path / "cache"), STEPS)
    before = [host.received_bytes() for host in cluster.made]
    found = finished(start(cluster, config))
    received = [host.received_bytes() - was for host, was in zip(cluster.made, before, strict=True)]
    assert list(found) == list(want) == list(range(1, STEPS + 1))
    assert [samples for _, samples in found.values()] == [samples for _, samples in want.values()]
    # Summed in another order, in float64.
    assert [loss for loss, _ in found.values()] == pytest.approx([loss for loss, _ in want.values()], rel=1e-10)
    assert min(received[1:]) > sent_bytes(config) > 0


@pytest.mark.soak
@pytest.mark.parametrize("strategy", ["ulysses", "ring"])
def test_two_hosts_learn_what_two_processes_of_one_host_learn_bit_for_bit(
    cluster: RayHosts, corpus: str, strategy: str
) -> None:
    shared = ["parallel.sp=2", f"parallel.strategy={strategy}", "model.dtype=float32"]
    one = two_workers(cluster, corpus, f"one-{strategy}", *shared, TOGETHER)
    two = two_workers(cluster, corpus, f"two-{strategy}", *shared, APART)
    before = [host.received_bytes() for host in cluster.made]
    together = finished(start(cluster, one))
    between = [host.received_bytes() for host in cluster.made]
    apart = finished(start(cluster, two))
    after = [host.received_bytes() for host in cluster.made]
    assert apart == together
    # The one host's gradients stayed at home.
    quiet = min(now - was for was, now in zip(before[1:], between[1:], strict=True))
    loud = min(now - was for was, now in zip(between[1:], after[1:], strict=True))
    assert loud - quiet > sent_bytes(two) / 2


@pytest.mark.soak
@pytest.mark.parametrize("how", ["cut", "killed"])
def test_a_host_is_lost_and_training_goes_on_without_it_in_time_until_it_is_back_and_no_sample_is_lost(
    cluster: RayHosts, corpus: str, ranks: RankPool, tmp_path: Path, how: str
) -> None:
    # It would go on for hours: it is stopped when everything was seen.
    elastic = ["parallel.min_workers=1", "parallel.grow_every_s=2", "train.checkpoint_every=10", APART]
    # Steps that are long enough for few of them to pass while a host is away.
    endless = ["train.steps=100000", "train.accumulation=8"]
    config = two_workers(cluster, corpus, how, *endless, *elastic)
    run, lost = start(cluster, config), cluster.made[2]
    run.driver.wait_for(" 30/")
    lost.cut()
    cut_at = time.time()
    try:
        if how == "killed":
            lost.crash()
        wait_until(lambda: any(went_on_at(run)), START_S, lambda: run.driver.text)
    finally:
        lost.restore()
    recovered_s = went_on_at(run)[0] - cut_at
    # A node that was taken for dead ends itself; one like it takes its place.
    cluster.worker(2, {"CPU": 2}, log=f"again-{how}.log")
    wait_until(lambda: sizes(run) == [1, 2] and len(went_on_at(run)) > 1, START_S, lambda: run.driver.text)
    run.driver.terminate()
    code, text = run.driver.end()
    assert code == 143, text
    assert [type(event.body) for event in run.events].count(RunRestarted) >= 1
    found = curve_of_any_size(run.events)
    last = max(found)
    assert list(found) == list(range(1, last + 1))
    alone = tiny_run(corpus, str(tmp_path / "alone"), endless[0], "train.accumulation=16")
    (want,) = ranks.run(curve_here, 1, alone, str(tmp_path / "cache"), last)
    for step, (loss, samples) in found.items():
        assert samples == want[step][1]
        assert loss == pytest.approx(want[step][0], rel=1e-6)
    print(f"{how}: went on {recovered_s:.1f} s after the link was cut, {last} steps")
    assert recovered_s < RECOVERED_S


def sizes(run: HostedRun) -> list[int]:
    return [event.body.workers for event in run.events if isinstance(event.body, RunResized)]


def went_on_at(run: HostedRun) -> list[float]:
    """When the first step after each change of size was told of."""
    found, changed = [], False
    for event in run.events:
        if isinstance(event.body, RunResized):
            changed = True
        elif isinstance(event.body, StepReport) and changed:
            found.append(event.time_s)
            changed = False
    return found


def curve_of_any_size(events: list[Event]) -> Curve:
    """Of a step that was done twice, by one worker and by two, the sums may end differently; the samples may not."""
    steps: Curve = {}
    for event in events:
        if isinstance(event.body, StepReport):
            loss, samples = steps.setdefault(event.body.step, (event.body.loss, event.body.samples))
            assert event.body.samples == samples
            assert event.body.loss == pytest.approx(loss, rel=1e-6)
    return dict(sorted(steps.items()))
