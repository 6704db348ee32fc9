"""Training on a real Ray survives what clusters do: killed workers, controllers and drivers, and the wish to stop."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from ray.util.state import list_actors
from tests.support.corpus import small_corpus
from tests.support.local_ray import LocalRay
from tests.support.runs import Curve, curve, tiny_run

from farspan.config.load import dump_config
from farspan.config.schema import RunConfig
from farspan.errors import ClusterError
from farspan.jobs.metrics import RunMetrics
from farspan.jobs.progress import StopWish
from farspan.jobs.room import fits
from farspan.jobs.train import run_training
from farspan.telemetry.events import (
    EventBody,
    PlanPredicted,
    PlanSteppedDown,
    RunPreempted,
    RunResized,
    RunRestarted,
    RunStarted,
    StepReport,
    read_events,
)

DASHBOARDS = Path(__file__).resolve().parents[2] / "infra" / "monitoring" / "dashboards"
STEPS = 12
EVERY = 3
LOSS = "ray_farspan_train_loss_nats"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_corpus(tmp_path_factory.mktemp("survival"))


def run_config(corpus: str, output: Path, *more: str) -> RunConfig:
    two = ["parallel.workers=2", "model.dtype=float32", f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}"]
    return tiny_run(corpus, str(output), *two, *more)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: LocalRay, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    events: list[EventBody] = []
    config = run_config(corpus, tmp_path_factory.mktemp("whole") / "run")
    run_training(config, [], events.append, predicted=PlanPredicted(step_s=0.5, device_bytes=1 << 20))
    whole = curve(events)
    assert list(whole) == list(range(1, STEPS + 1))
    assert whole[STEPS][0] < whole[1][0]
    assert len({samples for _, samples in whole.values()}) == STEPS
    return whole


# What no undisturbed run tells.
TROUBLES: tuple[EventBody, ...] = (
    RunRestarted(step=3, redone=2, reason="a worker was lost"),
    RunPreempted(step=4, reason="asked"),
    RunResized(step=5, workers=1, accumulation=2, reason="no room for 2"),
    PlanSteppedDown(step=6, reason="out of memory", change="offload"),
)


def wanted_by_dashboards() -> set[str]:
    files = [json.loads(file.read_text(encoding="utf-8")) for file in DASHBOARDS.glob("*.json")]
    asked = [target["expr"] for file in files for panel in file["panels"] for target in panel["targets"]]
    return set(re.findall(r"\bray_farspan_\w+", " ".join(asked)))


def exported() -> dict[str, list[str]]:
    """The samples of farspan that Prometheus would read of the node now, by name."""
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    found: dict[str, list[str]] = {}
    for line in lines:
        # Samples alone: what is declared and was never told has no line of its own.
        if sample := re.match(r"(ray_farspan_\w+)\{", line):
            found.setdefault(sample[1], []).append(line)
    return found


def value_of(line: str) -> float:
    return float(line.split()[-1])


@pytest.fixture(scope="module")
def samples(undisturbed: Curve) -> dict[str, list[str]]:
    """The newest that Ray exported of every number, since the undisturbed run.

    Ray exports every few seconds, and forgets what is no longer told after a while: this comes right after that run.
    """
    with RunMetrics("troubled") as troubled:
        for body in TROUBLES:
            troubled.record(body)
    last, wanted, found = pytest.approx(undisturbed[STEPS][0], rel=1e-6), wanted_by_dashboards(), exported()
    ends = time.monotonic() + 90
    # What is there first may be of a step before the last.
    while time.monotonic() < ends and not (wanted <= found.keys() and value_of(found[LOSS][0]) == last):
        time.sleep(0.5)
        found |= exported()
    return found


def test_the_numbers_of_a_run_are_in_rays_prometheus_endpoint(
    undisturbed: Curve, samples: dict[str, list[str]]
) -> None:
    (line,) = samples[LOSS]
    assert 'run="run"' in line
    assert value_of(line) == pytest.approx(undisturbed[STEPS][0], rel=1e-6)


def test_every_number_of_the_dashboards_is_in_rays_prometheus_endpoint(samples: dict[str, list[str]]) -> None:
    wanted = wanted_by_dashboards()
    assert len(wanted) >= 15
    assert wanted - samples.keys() == set()


def kill_actor(cluster: LocalRay, class_name: str, choose: random.Random) -> None:
    """SIGKILL to the process of one living actor of this cluster."""
    found = list_actors(cluster.dashboard, filters=[("state", "=", "ALIVE")])
    pids = [actor.pid for actor in found if actor.class_name == class_name]
    os.kill(choose.choice(pids), signal.SIGKILL)


def disturbed(config: RunConfig, at: list[int], disturb: Callable[[], None]) -> list[EventBody]:
    """Everything told by a run that is disturbed once after each of the steps `at`."""
    events: list[EventBody] = []
    left = list(at)

    def tell(body: EventBody) -> None:
        events.append(body)
        if isinstance(body, StepReport) and left and body.step == left[0]:
            left.pop(0)
            disturb()

    run_training(config, [], tell)
    assert not left
    return events


@pytest.mark.parametrize("victim", ["RayTrainWorker", pytest.param("TrainController", marks=pytest.mark.long)])
def test_a_run_survives_a_killed_process_bit_for_bit(
    ray_cluster: LocalRay, corpus: str, undisturbed: Curve, tmp_path: Path, victim: str
) -> None:
    choose = random.Random(victim)
    at = choose.randrange(1, STEPS - 1)
    # One of them behind the steps, in pieces: a checkpoint may be under way when the process dies.
    behind = f"train.checkpoint_async={'true' if victim == 'RayTrainWorker' else 'false'}"
    config = run_config(corpus, tmp_path / "run", behind)
    events = disturbed(config, [at], lambda: kill_actor(ray_cluster, victim, choose))
    (restarted,) = [event for event in events if isinstance(event, RunRestarted)]
    # The one before, where the newest was still under way.
    assert restarted.redone <= (2 * EVERY if victim == "RayTrainWorker" else EVERY)
    assert restarted.step % EVERY == 0
    assert curve(events) == undisturbed
    # All four processors: nobody holds the room of the workers that were lost.
    assert fits(config, 4, 60.0)


@pytest.mark.soak
@pytest.mark.parametrize("victim", ["RayTrainWorker", "TrainController"])
def test_a_run_survives_many_kills_bit_for_bit(
    ray_cluster: LocalRay, corpus: str, undisturbed: Curve, tmp_path: Path, victim: str
) -> None:
    choose = random.Random(f"many {victim}")
    at = sorted(choose.sample(range(1, STEPS - 1), 6))
    config = run_config(corpus, tmp_path / "run", "train.max_restarts=6", "train.checkpoint_async=true")
    events = disturbed(config, at, lambda: kill_actor(ray_cluster, victim, choose))
    assert all(event.redone <= 2 * EVERY for event in events if isinstance(event, RunRestarted))
    assert curve(events) == undisturbed


@pytest.mark.long
def test_a_run_that_may_not_be_restarted_says_what_it_lost(ray_cluster: LocalRay, corpus: str, tmp_path: Path) -> None:
    config = run_config(corpus, tmp_path / "run", "train.max_restarts=0")
    with pytest.raises(ClusterError, match=r"not started again: train\.max_restarts=0 failures"):
        disturbed(config, [2], lambda: kill_actor(ray_cluster, "RayTrainWorker", random.Random(0)))


@pytest.mark.long
def test_a_run_asked_to_stop_publishes_a_checkpoint_and_goes_on_from_that_very_step(
    ray_cluster: LocalRay, corpus: str, undisturbed: Curve, tmp_path: Path
) -> None:
    config, wish, events = run_config(corpus, tmp_path / "run", "train.checkpoint_every=0"), StopWish(), []

    def tell(body: EventBody) -> None:
        events.append(body)
        if isinstance(body, StepReport) and body.step == 2:
            wish.ask("asked")

    assert run_training(config, [], tell, wish) is None
    stopped = events[-1]
    assert isinstance(stopped, RunPreempted)
    before = curve(events)
    again: list[EventBody] = []
    assert run_training(config, [], again.append) == f"{config.output}/model"
    after = curve(again)
    assert list(after) == list(range(stopped.step + 1, STEPS + 1))
    assert {**before, **after} == undisturbed


def start_driver(config: Path, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "farspan.cli.main", "train", str(config)],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def read_until(driver: subprocess.Popen[str], text: str) -> str:
    assert driver.stdout is not None
    seen = ""
    for line in driver.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"the driver ended before it said {text!r}:\n{seen}")


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_whose_driver_is_ended_goes_on_bit_for_bit_when_it_is_started_again(
    ray_cluster: LocalRay, corpus: str, undisturbed: Curve, tmp_path: Path, how: signal.Signals
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(dump_config(run_config(corpus, tmp_path / "run")))
    at = random.Random(how.name).randrange(1, STEPS - 2)
    with start_driver(config, tmp_path) as driver:
        read_until(driver, f"step {at:>5}/{STEPS}")
        driver.send_signal(how)
        rest = driver.communicate(timeout=120)[0]
    if how == signal.SIGTERM:
        assert driver.returncode == 143, rest
        assert "start it again to go on from its newest checkpoint" in rest
    with start_driver(config, tmp_path) as driver:
        rest = driver.communicate(timeout=180)[0]
    assert driver.returncode == 0, rest
    bodies = [event.body for event in read_events(tmp_path / "run" / "events.jsonl").events]
    assert len([body for body in bodies if isinstance(body, RunStarted)]) == 2
    assert curve(bodies) == undisturbed


@pytest.mark.long
def test_a_run_starts_with_the_workers_there_is_room_for_and_grows_when_there_is_more(
    ray_cluster: LocalRay, corpus: str, undisturbed: Curve, tmp_path: Path
) -> None:
    @ray.remote(num_cpus=2)
    class Tenant:
        def ready(self) -> bool:
            return True

    tenant = Tenant.remote()
    assert ray.get(tenant.ready.remote(), timeout=60)
    elastic = ["parallel.min_workers=1", "parallel.grow_every_s=0.2", "resources.cpus_per_worker=2"]
    events: list[EventBody] = []

    def tell(body: EventBody) -> None:
        events.append(body)
        if isinstance(body, StepReport) and body.step == 2:
            ray.kill(tenant)

    run_training(run_config(corpus, tmp_path / "run", *elastic), [], tell)
    sizes = [(event.workers, event.accumulation) for event in events if isinstance(event, RunResized)]
    assert sizes == [(1, 2), (2, 1)]
    grown = curve(events)
    assert {s: r[1] for s, r in grown.items()} == {s: r[1] for s, r in undisturbed.items()}
    assert {s: r[0] for s, r in grown.items()} == pytest.approx({s: r[0] for s, r in undisturbed.items()}, rel=1e-6)
