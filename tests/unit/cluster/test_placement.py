"""Workers that can never have room on a cluster's nodes are named before there are nodes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from farspan.cli.main import run
from farspan.cluster.launcher import render_launcher
from farspan.cluster.placement import Ask, asks_of_endpoint, asks_of_run, misfits
from farspan.config.check import check_run
from farspan.config.cluster import ClusterSpec
from farspan.config.load import load_config
from farspan.config.schema import RoleConfig, RunConfig, ServeConfig
from farspan.config.serve_rules import check_serve
from farspan.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[3]


def launcher(provider: str = "aws", *overrides: str) -> dict[str, Any]:
    spec = load_config(ClusterSpec, str(REPOSITORY / "infra" / "cluster.yaml"), list(overrides))
    return dict(yaml.safe_load(render_launcher(spec, provider)))


def workers(count: int, **bundle: float) -> Ask:
    return Ask("parallel.workers", count, {name.replace("_", "-"): amount for name, amount in bundle.items()})


@pytest.mark.parametrize(
    "ask",
    [
        workers(8, CPU=8, GPU=1, farspan_train=1),
        # One node of eight GPUs and eight nodes of one.
        workers(16, CPU=1, GPU=1),
        workers(4, CPU=16, GPU=1, farspan_prefill=1),
        # Four of the CPU nodes; the training node's 192 CPUs, the other nodes' 8 times 16.
        workers(4 + 12 + 8, CPU=16),
    ],
)
def test_what_fills_the_nodes_exactly_has_room(ask: Ask) -> None:
    assert misfits(launcher(), [ask]) == []


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (workers(9, CPU=8, GPU=1, farspan_train=1), "for 8 workers .* got 9; allow 1 more gpu-train"),
        (workers(17, CPU=1, GPU=1), "for 16 workers"),
        (workers(10, CPU=16, GPU=1, farspan_prefill=1), "got 10; allow 6 more prefill"),
        (workers(1, CPU=8, GPU=16), "no node type has room for one worker of 8 CPU, 16 GPU"),
        (workers(1, CPU=1, farspan_trian=1), "no node type has room for one worker of 1 CPU, 1 farspan-trian"),
    ],
)
def test_what_has_no_room_is_told_with_a_way_out(ask: Ask, said: str) -> None:
    (sentence,) = misfits(launcher(), [ask])
    assert sentence.startswith("parallel.workers: ")
    assert re.search(said, sentence), sentence


def test_the_way_out_leads_out() -> None:
    ask = workers(10, CPU=16, GPU=1, farspan_prefill=1)
    assert misfits(launcher("aws", "prefill.max_nodes=10"), [ask]) == []
    assert misfits(launcher("aws", "prefill.max_nodes=9"), [ask]) != []


def test_two_that_have_room_alone_and_none_together_are_told() -> None:
    one, other = workers(12, CPU=1, GPU=1), Ask("decode.replicas", 8, {"CPU": 1, "GPU": 1})
    assert misfits(launcher(), [one]) == misfits(launcher(), [other]) == []
    (sentence,) = misfits(launcher(), [one, other])
    assert sentence.startswith("parallel.workers and decode.replicas: ask for 20 GPU together, and all nodes have 16")


def test_machines_that_stay_offer_what_they_have() -> None:
    assert misfits(launcher("local"), [workers(1000, CPU=1000)]) == []


def test_an_elastic_run_needs_room_for_its_least_and_an_endpoint_for_both_roles() -> None:
    config = load_config(RunConfig, None, ["data.corpus=c", "output=o", "parallel.workers=16"])
    assert [(ask.field, ask.count) for ask in asks_of_run(config)] == [("parallel.workers", 16)]
    config.parallel.min_workers, config.resources.gpus_per_worker = 4, 1.0
    assert [(ask.field, ask.count, ask.bundle) for ask in asks_of_run(config)] == [
        ("parallel.min_workers", 4, {"CPU": 1.0, "GPU": 1.0})
    ]
    endpoint = ServeConfig(model="m", decode=RoleConfig(replicas=3, custom={"farspan-decode": 1}))
    assert [(ask.field, ask.count, ask.bundle) for ask in asks_of_endpoint(endpoint)] == [
        ("prefill.replicas", 1, {"CPU": 0.5}),
        ("decode.replicas", 3, {"CPU": 0.5, "farspan-decode": 1}),
    ]
    # Ranks of one worker find room on one node, or none.
    endpoint.engine.tensor_parallel, endpoint.decode.gpus = 4, 1
    assert asks_of_endpoint(endpoint)[1].bundle == {"CPU": 2.0, "GPU": 4, "farspan-decode": 1}


@pytest.mark.parametrize("verb", ["plan", "validate"])
def test_the_command_refuses_a_run_and_an_endpoint_without_room(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, serve = tmp_path / "run.yaml", tmp_path / "serve.yaml"
    train.write_text("{data: {corpus: c}, output: o, parallel: {workers: 8}, resources: {gpus_per_worker: 1}}")
    serve.write_text("{model: m, prefill: {gpus: 1, custom: {farspan-prefill: 1}, replicas: 5}}")
    words = ["cluster", verb, str(REPOSITORY / "infra" / "cluster.yaml"), "--json"]
    assert run([*words, "--train", str(train)]) == 0
    fine = json.loads(capsys.readouterr().out)
    assert (fine.get("unplaced", []), fine.get("ok", True)) == ([], True)
    assert run([*words, "--train", str(train), "--serve", str(serve)]) == 2
    assert "prefill.replicas: must find room on the nodes of the cluster" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("custom", "said"), [("{farspan-train: 0}", "must be more than 0"), ("{GPU: 1}", "custom resource")]
)
def test_a_resource_that_is_none_or_not_of_a_type_is_refused(custom: str, said: str) -> None:
    run_config = load_config(RunConfig, None, ["data.corpus=c", "output=o", f"resources.custom={custom}"])
    with pytest.raises(ConfigError, match=said):
        check_run(run_config)
    endpoint = load_config(ServeConfig, None, ["model=m", f"decode.custom={custom}"])
    with pytest.raises(ConfigError, match=said):
        check_serve(endpoint)
