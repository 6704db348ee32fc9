"""Ray's own autoscaler finds room for our placement groups on the node types of our spec, where we say there is."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.hosts import hosts
from tests.support.ray_hosts import REPOSITORY, Process, RayHosts, shared_folder

from farspan.cluster.launcher import render_launcher
from farspan.cluster.placement import Ask, asks_of_endpoint, asks_of_run, misfits
from farspan.config.cluster import ClusterSpec
from farspan.config.load import load_config
from farspan.config.schema import RoleConfig, RunConfig, ServeConfig

WHOLE_S = 400.0
# Of what can never be placed: longer than all that can took.
NEVER_S = 15.0


def launcher() -> dict[str, Any]:
    spec = load_config(ClusterSpec, str(REPOSITORY / "infra" / "cluster.yaml"), [])
    return dict(yaml.safe_load(render_launcher(spec, "aws")))


def training(workers: int) -> list[Ask]:
    custom = ["resources.custom={farspan-train: 1}", "resources.gpus_per_worker=1", "resources.cpus_per_worker=8"]
    named = ["data.corpus=none", "output=none", f"parallel.workers={workers}"]
    return asks_of_run(load_config(RunConfig, None, [*custom, *named]))


def serving(prefill: int, decode: int) -> list[Ask]:
    def role(name: str, count: int) -> RoleConfig:
        return RoleConfig(replicas=count, cpus=4, gpus=1, custom={f"farspan-{name}": 1})

    return asks_of_endpoint(ServeConfig(model="m", prefill=role("prefill", prefill), decode=role("decode", decode)))


@pytest.mark.soak
def test_what_we_say_has_room_is_placed_by_rays_autoscaler_and_what_we_say_has_none_is_not() -> None:
    (fits,), (prefill, decode), (too_many,), (_, too_much) = training(8), serving(1, 2), training(9), serving(1, 5)
    assert misfits(launcher(), [fits]) == misfits(launcher(), [prefill, decode]) == []
    for ask, field in ((too_many, "parallel.workers"), (too_much, "decode.replicas")):
        (sentence,) = misfits(launcher(), [ask])
        assert sentence.startswith(f"{field}: must find room")
    asks = [
        (0, [dict(fits.bundle)] * fits.count),
        (0, [dict(prefill.bundle)] * prefill.count + [dict(decode.bundle)] * decode.count),
        (NEVER_S, [dict(too_many.bundle)] * too_many.count),
        (NEVER_S, [dict(too_much.bundle)] * too_much.count),
    ]
    with shared_folder() as folder, hosts(1) as made:
        found = RayHosts(made, folder)
        question = {"types": launcher()["available_node_types"], "address": made[0].address, "asks": asks}
        environment = {**found.environment(), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        # In a host `ray stop`, with which it begins, reaches nobody else.
        words = (sys.executable, "-m", "tests.support.host_autoscaling", json.dumps(question))
        log = folder / "log"
        _, text = Process(made[0].start(*words, log=log, env=environment), log).end(WHOLE_S)
    answers = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert answers, text
    assert [answer.get("ready") for answer in answers] == [True, True, False, False, None], text
    assert answers[0]["kinds"] == ["farspan-train"]
    assert answers[1]["kinds"] == ["farspan-decode", "farspan-decode", "farspan-prefill"]
    assert answers[-1]["left"] == []
