"""The launcher files say everything themselves, and Ray's and EC2's own schemas accept them, all without a network.

Not proved here: that the clouds have such machines, that the setup commands succeed, that the nodes find each other.
"""

import copy
import os
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import ray._raylet
import yaml
from ray.autoscaler._private.util import prepare_config

from farspan.cli.launcher import problems as launcher_problems
from farspan.cluster.environment import WATCHES
from farspan.cluster.launcher import render_launcher
from farspan.cluster.tree import LAUNCHER_FILES
from farspan.config.cluster import ClusterSpec
from farspan.config.load import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
LOCK = dict(
    line.split("==") for line in (REPOSITORY / "requirements.lock").read_text(encoding="utf-8").splitlines() if line
)
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SPEC_FILE = str(REPOSITORY / "infra" / "cluster.yaml")
SPEC = load_config(ClusterSpec, SPEC_FILE, [])

Config = dict[str, Any]


def load(file: str = "ray_cluster.yaml") -> Config:
    return yaml.safe_load((REPOSITORY / file).read_text(encoding="utf-8"))


def problems(config: Config) -> list[str]:
    return launcher_problems(config, SPEC.software)


@pytest.mark.parametrize("file", LAUNCHER_FILES.values())
def test_a_committed_launcher_file_has_no_problem(file: str) -> None:
    assert problems(load(file)) == []


def test_the_versions_of_the_spec_are_those_of_the_lock_and_of_this_project() -> None:
    software = SPEC.software
    locked = {name: getattr(software, name) for name in ("ray", "torch", "transformers", "nixl", "boto3")}
    assert locked == {name: LOCK[name] for name in locked}
    assert software.farspan == PROJECT["version"]


def test_ray_of_the_cluster_file_is_ray_of_the_lock_and_of_this_environment() -> None:
    assert f"ray[serve,train]=={LOCK['ray']}" in " ".join(load()["setup_commands"])
    assert ray.__version__ == LOCK["ray"]


def test_preparing_the_file_adds_nothing_that_was_not_written() -> None:
    config = load()
    prepared = prepare_config(copy.deepcopy(config))
    # Ray keeps its own legacy sections beside ours; what it will run and start must be ours alone.
    for key in ("head_start_ray_commands", "worker_start_ray_commands", "provider", "auth", "file_mounts", "docker"):
        assert prepared[key] == config.get(key, {}), key
    assert prepared["head_setup_commands"] == config["setup_commands"] + config["head_setup_commands"]
    assert prepared["worker_setup_commands"] == config["setup_commands"]
    assert prepared["available_node_types"] == config["available_node_types"]


def test_every_health_check_variable_is_one_that_this_ray_knows() -> None:
    binary = Path(ray._raylet.__file__).read_bytes()
    assert [name for name in WATCHES if name.removeprefix("RAY_").encode() not in binary] == []


def test_the_environment_command_writes_lines_that_a_shell_reads_back(tmp_path: Path) -> None:
    command = next(c for c in load()["setup_commands"] if "/etc/profile.d/farspan.sh" in c)
    write, _, target = command.partition("| sudo tee ")
    assert target == "/etc/profile.d/farspan.sh > /dev/null"
    script = f'{write} > "$HOME/farspan.sh"; . "$HOME/farspan.sh"; echo "$PATH"; env | grep ^RAY_ | sort'
    answer = subprocess.run(
        ["bash", "-eu", "-c", script],
        env={"HOME": str(tmp_path), "PATH": os.defpath}, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    path, *variables = answer.stdout.splitlines()
    assert path == f"{tmp_path}/farspan-env/bin:{os.defpath}"
    assert f"RAY_AUTH_TOKEN_PATH={tmp_path}/.ray/auth_token" in variables
    assert "RAY_health_check_failure_threshold=3" in variables


def _set(path: str, value: object) -> Callable[[Config], None]:
    def mutate(config: Config) -> None:
        *parents, last = path.split("|")
        for name in parents:
            config = config[name]
        config[last] = value

    return mutate


def _drop(path: str) -> Callable[[Config], None]:
    def mutate(config: Config) -> None:
        *parents, last = path.split("|")
        for name in parents:
            config = config[name]
        del config[last]

    return mutate


def _replace(key: str, old: str, new: str) -> Callable[[Config], None]:
    def mutate(config: Config) -> None:
        assert any(old in command for command in config[key])
        config[key] = [command.replace(old, new) for command in config[key]]

    return mutate


HEADS = load()["available_node_types"]["head"]["node_config"]["IamInstanceProfile"]


@pytest.mark.parametrize(
    ("mutate", "said"),
    [
        (_set("max_worker", 3), "ray refuses it"),
        (_set("available_node_types|cpu|resource", {}), "ray refuses it"),
        (_set("head_node_type", "haed"), "ray refuses it"),
        (_set("max_workers", "many"), "ray refuses it"),
        (_set("available_node_types|cpu|min_workers", 99), "ray refuses it"),
        (_set("provider|use_internal_ip", True), "provider.use_internal_ip is not a key"),
        (_set("provider|regoin", "us-east-1"), "did you mean 'region'?"),
        (_set("available_node_types|decode|idle_timeout_s", 0), "decode: idle_timeout_s must"),
        (_drop("provider|cache_stopped_nodes"), "provider.cache_stopped_nodes is left"),
        (_drop("setup_commands"), "setup_commands is left to Ray's defaults"),
        (_drop("head_setup_commands"), "head_setup_commands is left to Ray's defaults"),
        (_drop("available_node_types|head|node_config|IamInstanceProfile"), "head: IamInstanceProfile is left"),
        (_drop("available_node_types|decode|node_config|SecurityGroupIds"), "decode: SecurityGroupIds is left"),
        (_set("available_node_types|cpu|node_config|IamInstanceProfile", HEADS), "cpu: it has the head's IamInstanceP"),
        (
            _set("available_node_types|cpu|node_config|IamInstanceProfile", {"Name": "farspan-head"}),
            "it has the head's",
        ),
        (_set("available_node_types|cpu|node_config|InstanceTyp", "m7i.large"), "EC2 has no InstanceTyp"),
        (_set("available_node_types|cpu|node_config|InstanceType", 7), "EC2 refuses it"),
        (_set("available_node_types|cpu|node_config|MetadataOptions", {"HttpTokens": "optional"}), "without a session"),
        (_set("available_node_types|cpu|labels", {"farspan role": "cpu"}), "cpu: "),
        (_drop("available_node_types|prefill"), "node type prefill is missing"),
        (_set("available_node_types|gpu-train|max_workers", 64), "max_workers is not the sum"),
        (_set("idle_timeout_minutes", 0), "idle_timeout_minutes must"),
        (_replace("setup_commands", "ray[serve,train]==2.60.0", "ray[serve,train]>=2.60"), "install another Ray"),
        (_replace("setup_commands", "torch==2.13.0", "torch==2.12.0"), "torch==2.12.0 is not in the spec"),
        (_replace("setup_commands", "farspan-0.1.0", "farspan-0.0.9"), "is not sent and installed"),
        (_replace("setup_commands", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"), "RAY_AUTH_MODE=token is not"),
        (_replace("setup_commands", "RAY_health_check_period_ms", "RAY_health_period_ms"), "check_period_ms is not"),
        (_drop("file_mounts|~/.ray/auth_token"), "the token is not sent"),
        (_replace("head_start_ray_commands", "127.0.0.1", "0.0.0.0"), "beyond loopback"),
        (_replace("worker_start_ray_commands", "test -s ~/.ray/auth_token && ", ""), "not without a token"),
        (_set("auth|ssh_proxy_command", "AKIAIOSFODNN7EXAMPLE"), "a secret"),
        (_replace("setup_commands", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=x"), "a secret"),
    ],
)
def test_a_cluster_file_with_one_mistake_is_refused(mutate: Callable[[Config], None], said: str) -> None:
    # A deep copy through YAML, so that anchors do not share one node_config between node types.
    config = yaml.safe_load(yaml.dump(load(), Dumper=_Unshared))
    mutate(config)
    assert [problem for problem in problems(config) if said in problem] != [], problems(config)


def test_a_worker_of_google_cloud_with_one_of_the_heads_accounts_is_refused() -> None:
    config = load(LAUNCHER_FILES["gcp"])
    node_types = config["available_node_types"]
    head = node_types["head"]["node_config"]["serviceAccounts"][0]["email"]
    node_types["cpu"]["node_config"]["serviceAccounts"] = [{"email": head, "scopes": ["other"]}]
    assert problems(config) == ["cpu: it has the head's serviceAccounts, which may start and end machines"]


SECURE = yaml.safe_load(render_launcher(load_config(ClusterSpec, SPEC_FILE, ["tls_folder=~/tls"]), "aws"))


def test_certificates_are_sent_without_the_authoritys_key_and_switched_on() -> None:
    assert problems(SECURE) == []
    sent = {remote: local for remote, local in SECURE["file_mounts"].items() if "tls" in remote}
    assert sent == {f"~/farspan-tls/{name}": f"~/tls/{name}" for name in ("ca.crt", "node.crt", "node.key")}
    assert not [name for name in load()["file_mounts"] if "tls" in name]


@pytest.mark.parametrize(
    ("mutate", "said"),
    [
        (_drop("file_mounts|~/farspan-tls/ca.crt"), "ca.crt is not sent to the nodes"),
        (_set("file_mounts|~/farspan-tls/ca.key", "~/tls/ca.key"), "the authority's key (ca.key) is sent"),
        (_set("file_mounts|~/farspan-tls", "~/farspan-tls"), "~/farspan-tls is sent to the nodes, where only"),
        (_set("file_mounts|/home/ubuntu/farspan-tls/", "~/x"), "/home/ubuntu/farspan-tls/ is sent to the nodes, where"),
        (_set("file_mounts|~/other", "~/tls"), "~/tls is sent to the nodes, and holds the authority's key"),
        (_set("file_mounts|~/farspan-tls/key", "~/tls/key"), "~/farspan-tls/key is sent to the nodes, where only"),
        (_replace("setup_commands", "RAY_USE_TLS=1", "RAY_USE_TLS=0"), "RAY_USE_TLS=1 is not set"),
        (_replace("setup_commands", "RAY_TLS_CA_CERT", "RAY_TLS_CA"), "RAY_TLS_CA_CERT=$HOME/farspan-tls/ca.crt is"),
    ],
)
def test_half_of_tls_is_refused(mutate: Callable[[Config], None], said: str) -> None:
    config = copy.deepcopy(SECURE)
    mutate(config)
    assert [problem for problem in problems(config) if said in problem] != [], problems(config)


class _Unshared(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True
