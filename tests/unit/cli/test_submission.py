"""What a run will need on a cluster's nodes is said before it is submitted, and what cannot be is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.corpus import small_corpus
from tests.support.runs import tiny_run

from farspan.cli.main import run
from farspan.cli.submission import foresee, obstacles_of, target_of
from farspan.cluster.nodes import Cluster, Node
from farspan.config.load import dump_config
from farspan.models.checkpoint import make_config

GIB = 2.0**30
EIGHT_B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": "false",
}
ON_GPU = ["resources.gpus_per_worker=1", "model.dtype=bfloat16", "data.sequence_tokens=8192"]


def gpu_node(address: str, gpus: int, name: str = "NVIDIA H100 80GB HBM3", mib: float = 81559) -> Node:
    return Node(address, {"CPU": 64.0, "GPU": float(gpus)}, 1000 * GIB, name, mib * 2**20)


def cpu_cluster(cpus: int, gib: float, *, grows: bool | None = False) -> Cluster:
    return Cluster((Node("10.0.0.1", {"CPU": float(cpus)}, gib * GIB),), grows)


def test_on_gpus_the_nodes_of_the_cluster_are_the_machine() -> None:
    config = tiny_run("nowhere", "nowhere/run", *ON_GPU, "parallel.workers=16", **EIGHT_B)
    cluster = Cluster((gpu_node("10.0.0.1", 8), gpu_node("10.0.0.2", 8), Node("10.0.0.3", {"CPU": 8.0}, 8 * GIB)))
    target = target_of(config, cluster)
    assert target.machine is not None
    assert target.machine.text() == "2 x 8 x h100 of 79.6 GiB; for each: 125 GiB host"
    assert target.source == (
        "memory as the cluster's nodes (2 with room) say; speeds are assumed shares of the data sheet"
    )
    forecast = foresee(config, make_config("llama", config.model.settings), target)
    assert [what for what, _ in forecast.lines] == ["machine", "step", "peak memory", "breaks first"]
    assert list(obstacles_of(config, cluster, forecast)) == []


def test_weights_that_no_gpu_holds_are_an_obstacle_and_activations_that_may_not_fit_a_warning() -> None:
    cluster = Cluster((gpu_node("10.0.0.1", 1, "NVIDIA L4", 23034),))
    config = tiny_run("nowhere", "nowhere/run", *ON_GPU, **EIGHT_B)
    forecast = foresee(config, make_config("llama", config.model.settings), target_of(config, cluster))
    assert "the largest GPU has 22.5 GiB" in str(next(obstacles_of(config, cluster, forecast)))
    fits = tiny_run("nowhere", "nowhere/run", *ON_GPU[:-1], "data.sequence_tokens=131072",
                    **{**EIGHT_B, "num_hidden_layers": 2, "vocab_size": 4096})  # fmt: skip
    forecast = foresee(fits, make_config("llama", fits.model.settings), target_of(fits, cluster))
    assert list(obstacles_of(fits, cluster, forecast)) == []
    assert forecast.lines[-1][1].startswith("it is not predicted to fit: device overflows by ")


def test_what_the_config_says_of_the_gpus_is_not_asked_and_what_nobody_knows_is_not_predicted() -> None:
    named = tiny_run("nowhere", "nowhere/run", *ON_GPU, "plan.gpu=a100-80", "plan.choose=never", **EIGHT_B)
    target = target_of(named, None)
    assert target.machine is not None
    assert target.machine.device.name == "a100-80"
    unnamed = tiny_run("nowhere", "nowhere/run", *ON_GPU, **EIGHT_B)
    strange = Cluster((gpu_node("10.0.0.1", 1, "Strange 9000"),))
    for cluster in (None, strange, cpu_cluster(4, 8)):
        target = target_of(unnamed, cluster)
        assert target.machine is None
        assert target.source.endswith("name the GPU with plan.gpu=h100")
        assert len(foresee(unnamed, make_config("llama", unnamed.model.settings), target).lines) == 1


def test_on_cpus_memory_is_the_nodes_and_speeds_are_said_to_be_assumed() -> None:
    config = tiny_run("nowhere", "nowhere/run", "parallel.workers=4")
    target = target_of(config, cpu_cluster(2, 8))
    assert target.machine is not None
    assert (target.machine.nodes, target.machine.devices_per_node, target.machine.device.bytes) == (2, 2, 4 * GIB)
    assert "memory as the cluster's nodes (1 with room) say; speeds are assumed" in target.source
    assert "assumed: the cluster does not say what its nodes have" in target_of(config, None).source


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was submitted to a cluster of one node of two CPUs."""
    names: list[str] = []
    monkeypatch.setattr("farspan.cli.submission._submit", lambda config, address: names.append(config.name))
    monkeypatch.setattr("farspan.jobs.submit.is_this_machine", lambda address: True)
    return names


@pytest.mark.parametrize("grows", [False, True, None])
def test_a_run_without_room_is_refused_where_no_node_can_come_and_warned_of_where_one_may(
    grows: bool | None,
    submitted: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("farspan.jobs.facts.ask_cluster", lambda address: cpu_cluster(2, 8, grows=grows))
    config = tiny_run(small_corpus(tmp_path), str(tmp_path / "run"), "parallel.workers=3", "name=mine")
    (tmp_path / "run.yaml").write_text(dump_config(config), encoding="utf-8")
    words = ["train", str(tmp_path / "run.yaml"), "--cluster", "http://127.0.0.1:8265"]
    code = run(words)
    said = capsys.readouterr()
    refusal = "must find room on the cluster's nodes, which have it for 2 workers of 1 CPU, got 3"
    assert "peak memory" in said.out
    if grows is False:
        assert (code, submitted) == (2, [])
        assert refusal in said.err
    else:
        assert (code, submitted) == (0, ["mine"])
        assert refusal in said.out
        assert "it waits resources.timeout_s=600 for them" in said.out
    assert run([*words, "parallel.workers=2", "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert "workers: 2" in dry
    assert "peak memory" in dry
    assert len(submitted) == (0 if grows is False else 1)
