"""Training on a real Ray survives the loss of a whole node: its raylet and every process on it, at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_actors
from tests.support.corpus import REPOSITORY, small_corpus
from tests.support.local_ray import LocalRay
from tests.support.other_node import ADDRESS, OtherNode, other_node
from tests.support.runs import Curve, curve, tiny_run

from farspan.config.load import dump_config
from farspan.config.schema import RunConfig
from farspan.jobs.room import find_room, fits, silent_nodes
from farspan.jobs.train import run_training
from farspan.telemetry.events import EventBody, RunResized, RunRestarted, StepReport, read_events
from farspan.train.elastic import legal_sizes

STEPS, EVERY, AT = 9, 3, 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_corpus(tmp_path_factory.mktemp("nodes"))


def run_config(corpus: str, output: Path, *more: str) -> RunConfig:
    two = ["parallel.workers=2", "model.dtype=float32", f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}"]
    return tiny_run(corpus, str(output), *two, *more)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: LocalRay, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    events: list[EventBody] = []
    run_training(run_config(corpus, tmp_path_factory.mktemp("whole") / "run"), [], events.append)
    whole = curve(events)
    assert list(whole) == list(range(1, STEPS + 1))
    assert whole[STEPS][0] < whole[1][0]
    return whole


@ray.remote
class Tenant:
    def ready(self) -> bool:
        return True


@contextmanager
def occupied(num_cpus: int) -> Iterator[ray.actor.ActorHandle]:
    """So many CPUs of this process's own node are somebody else's."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    tenant = Tenant.options(num_cpus=num_cpus, scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    assert ray.get(tenant.ready.remote(), timeout=120)
    try:
        yield tenant
    finally:
        ray.kill(tenant)


def actors_on(cluster: LocalRay, node: OtherNode) -> list[str]:
    """Classes of the living actors of a node, in order."""
    found = list_actors(
        cluster.dashboard, filters=[("state", "=", "ALIVE"), ("node_id", "=", str(node.node_id))], detail=True
    )
    return sorted(actor.class_name for actor in found)


@pytest.mark.long
@pytest.mark.parametrize("goes_on", ["on what is left", pytest.param("when it is back", marks=pytest.mark.soak)])
def test_a_run_survives_the_loss_of_a_node_with_a_worker_bit_for_bit(
    ray_cluster: LocalRay, corpus: str, undisturbed: Curve, tmp_path: Path, goes_on: str
) -> None:
    events: list[EventBody] = []
    with ExitStack() as stack:
        # One CPU is left here, and one is there: each node has a worker.
        tenant = stack.enter_context(occupied(3))
        node = stack.enter_context(other_node(ray_cluster.gcs_address, 1))
        lost: list[str] = []

        def tell(body: EventBody) -> None:
            events.append(body)
            if isinstance(body, StepReport) and body.step == AT and not lost:
                lost.extend(actors_on(ray_cluster, node))
                node.kill()
                if goes_on == "on what is left":
                    ray.kill(tenant)
                else:
                    node.wait(alive=False)
                    stack.enter_context(other_node(ray_cluster.gcs_address, 1))

        run_training(run_config(corpus, tmp_path / "run"), [], tell)
    # Ray Train's watcher of preemptions takes no CPU and may live on either node; the controller may not be lost.
    assert lost.count("RayTrainWorker") == 1
    assert "TrainController" not in lost
    restarts = [event for event in events if isinstance(event, RunRestarted)]
    assert [restart.step for restart in restarts][:1] == [EVERY]
    assert all(restart.redone <= EVERY for restart in restarts)
    assert curve(events) == undisturbed


@pytest.mark.soak
def test_room_is_found_beside_a_node_that_froze_and_the_head_goes_on_placing(
    ray_cluster: LocalRay, corpus: str, tmp_path: Path
) -> None:
    config = run_config(corpus, tmp_path / "run")
    with ExitStack() as stack:
        tenant = stack.enter_context(occupied(3))
        node = stack.enter_context(other_node(ray_cluster.gcs_address, 1))
        assert silent_nodes() == []
        node.freeze()
        ray.kill(tenant)
        # Ray counts on it for about a minute more: what is placed there in that time is waited for without an end.
        assert silent_nodes() == [f"{ADDRESS}:{node.port}"]
        size = find_room(config, legal_sizes(config), again=True)
        assert size.workers == 2
        assert node.node_id is None
        assert fits(config, 4, 60.0)


@pytest.mark.soak
def test_a_run_that_loses_a_node_goes_on_with_one_worker_until_the_node_is_back_and_learns_the_same(
    ray_cluster: LocalRay, corpus: str, tmp_path: Path
) -> None:
    # Enough steps that the run is not done before somebody sees that there is room again.
    more = ["train.steps=60", "parallel.min_workers=1", "parallel.grow_every_s=0.2"]
    whole: list[EventBody] = []
    run_training(run_config(corpus, tmp_path / "whole", *more), [], whole.append)
    undisturbed, events = curve(whole), list[EventBody]()
    with ExitStack() as stack:
        stack.enter_context(occupied(3))
        nodes = [stack.enter_context(other_node(ray_cluster.gcs_address, 1))]

        def tell(body: EventBody) -> None:
            events.append(body)
            if isinstance(body, StepReport) and body.step == AT and len(nodes) == 1 and nodes[0].node_id is not None:
                nodes[0].kill()
                nodes[0].wait(alive=False)
            alone = any(isinstance(event, RunResized) and event.workers == 1 for event in events)
            if isinstance(body, StepReport) and alone and len(nodes) == 1:
                nodes.append(stack.enter_context(other_node(ray_cluster.gcs_address, 1)))

        run_training(run_config(corpus, tmp_path / "run", *more), [], tell)
    assert [event.workers for event in events if isinstance(event, RunResized)] == [1, 2]
    told = [event for event in events if isinstance(event, StepReport)]
    assert {report.step for report in told} == set(undisturbed)
    # Also of steps that were done twice, by two workers and by one.
    for report in told:
        loss, samples = undisturbed[report.step]
        assert report.samples == samples
        assert report.loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.soak
def test_a_run_survives_the_loss_of_the_node_with_its_controller_driver_and_workers_bit_for_bit(
    ray_cluster: LocalRay, corpus: str, undisturbed: Curve, tmp_path: Path
) -> None:
    config, file = run_config(corpus, tmp_path / "run"), tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    with occupied(4), other_node(ray_cluster.gcs_address, 2) as node:
        command = [sys.executable, "-m", "tests.support.driver", str(file), ray_cluster.gcs_address, ADDRESS]
        with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as driver:
            assert driver.stdout is not None
            said = next((line for line in driver.stdout if line == f"step {AT}\n"), None)
            lost = actors_on(ray_cluster, node)
            driver.kill()
            node.kill()
        assert said is not None, "the driver ended before"
    assert lost.count("RayTrainWorker") == 2
    assert {"TrainController", "EventMailbox"} < set(lost)
    before = [event.body for event in read_events(tmp_path / "run" / "events.jsonl").events]
    # Nobody is left to restart it: the same run is started again, here.
    after: list[EventBody] = []
    run_training(config, [], after.append)
    assert min(curve(after)) in (EVERY + 1, 2 * EVERY + 1)
    assert max(curve(before)) >= AT
    assert curve([*before, *after]) == undisturbed
