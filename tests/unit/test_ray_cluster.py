"""ray_cluster.yaml says everything itself, and Ray and EC2's own schemas accept it, all without a network.

Not proved here: that AWS has such machines, that the setup commands succeed on them, that the nodes find each other.
"""

import copy
import os
import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import jsonschema
import pytest
import ray
import ray._raylet
import yaml
from ray._private.label_utils import validate_node_label_syntax
from ray.autoscaler._private.util import prepare_config, validate_config

REPOSITORY = Path(__file__).resolve().parents[2]
LOCK = dict(
    line.split("==") for line in (REPOSITORY / "requirements.lock").read_text(encoding="utf-8").splitlines() if line
)
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]

PROVIDER_KEYS = {"type", "region", "availability_zone", "use_internal_ips", "cache_stopped_nodes"}
# Left out, each of these is filled from Ray's AWS defaults.
EXPLICIT_KEYS = {
    "max_workers", "upscaling_speed", "idle_timeout_minutes", "provider", "auth", "head_node_type",
    "available_node_types", "file_mounts", "cluster_synced_files", "file_mounts_sync_continuously", "rsync_exclude",
    "rsync_filter", "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands",
}  # fmt: skip
EXPLICIT_NODE_KEYS = {
    "InstanceType", "ImageId", "KeyName", "IamInstanceProfile", "SubnetIds", "SecurityGroupIds", "MetadataOptions",
    "BlockDeviceMappings",
}  # fmt: skip
ROLES = {"head", "cpu", "gpu-train", "prefill", "decode"}
ENVIRONMENT = {
    "RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token", "RAY_ENABLE_UV_RUN_RUNTIME_ENV=0",
    "RAY_USAGE_STATS_ENABLED=0",
}  # fmt: skip
WATCHES = (
    "grpc_client_keepalive_time_ms", "grpc_client_keepalive_timeout_ms", "health_check_initial_delay_ms",
    "health_check_period_ms", "health_check_timeout_ms", "health_check_failure_threshold",
)  # fmt: skip
SECRETS = re.compile(r"AKIA[0-9A-Z]{16}|-----BEGIN|[0-9a-f]{40,}|[A-Za-z0-9+/]{40,}={0,2}|RAY_AUTH_TOKEN=")

Config = dict[str, Any]


def load() -> Config:
    return yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text(encoding="utf-8"))


def problems(config: Config) -> list[str]:
    """Everything wrong with a cluster file, one sentence each."""
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except (ValueError, RuntimeError, KeyError, TypeError, jsonschema.ValidationError) as problem:
        return [f"ray refuses it: {str(problem).splitlines()[0]}"]
    if missing := sorted(EXPLICIT_KEYS - set(config)):
        return [f"{key} is left to Ray's defaults" for key in missing]
    return [
        *(f"provider.{key} is not a key we know" for key in sorted(set(config["provider"]) - PROVIDER_KEYS)),
        *(f"provider.{key} is left to Ray's defaults" for key in sorted(PROVIDER_KEYS - set(config["provider"]))),
        *_node_type_problems(config["available_node_types"]),
        *_limit_problems(config),
        *_pin_problems(config),
        *_auth_problems(config),
        *(["a secret stands in the file"] if SECRETS.search(yaml.safe_dump(config)) else []),
    ]


def _node_type_problems(node_types: Config) -> list[str]:
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    found = [f"node type {name} is missing" for name in sorted(ROLES - set(node_types))]
    for name, node_type in node_types.items():
        node = dict(node_type["node_config"])
        found += [f"{name}: {key} is left to Ray's defaults" for key in sorted(EXPLICIT_NODE_KEYS - set(node))]
        # SubnetIds is Ray's own key: it picks one of them.
        request = {k: v for k, v in node.items() if k != "SubnetIds"} | {"MinCount": 1, "MaxCount": 1}
        report = botocore.validate.ParamValidator().validate(request, shape)
        # botocore lets unknown keys pass at the top of a request unless they are looked for.
        found += [f"{name}: EC2 has no {key}" for key in sorted(set(request) - set(shape.members))]
        found += [f"{name}: EC2 refuses it: {report.generate_report()}"] if report.has_errors() else []
        for volume in node.get("BlockDeviceMappings", []):
            found += [] if volume.get("Ebs", {}).get("Encrypted") is True else [f"{name}: a disk is not encrypted"]
        if node.get("MetadataOptions", {}).get("HttpTokens") != "required":
            found.append(f"{name}: the instance metadata can be read without a session token")
        if "CPU" not in node_type["resources"]:
            found.append(f"{name}: its CPUs are left to a look-up")
        try:
            validate_node_label_syntax(node_type.get("labels", {}))
        except ValueError as problem:
            found.append(f"{name}: {problem}")
    return found


def _limit_problems(config: Config) -> list[str]:
    workers = {name: t for name, t in config["available_node_types"].items() if name != config["head_node_type"]}
    found = [f"{name}: max_workers is missing" for name, t in workers.items() if "max_workers" not in t]
    found += [f"{name}: nodes run while nobody needs them" for name, t in workers.items() if t.get("min_workers", 0)]
    if sum(t.get("max_workers", 0) for t in workers.values()) != config.get("max_workers"):
        found.append("max_workers is not the sum of the node types")
    if not 0 < config.get("idle_timeout_minutes", 0) <= 60:
        found.append("idle_timeout_minutes must lie in 1..60")
    if config["provider"].get("cache_stopped_nodes", True):
        found.append("idle nodes are stopped and go on costing their disks")
    return found


def _pin_problems(config: Config) -> list[str]:
    commands = [c for key in ("setup_commands", "head_setup_commands", "worker_setup_commands") for c in config[key]]
    installs = [c for c in commands if "pip install" in c]
    found = []
    pins: dict[str, str] = {}
    for name, version in re.findall(r"'([A-Za-z0-9_.-]+)(?:\[[a-z,]+\])?([^']*)'", " ".join(installs)):
        pins[name] = version
        if version != f"=={LOCK.get(name)}":
            found.append(f"{name}{version} is not the version of requirements.lock ({LOCK.get(name)})")
    found += [f"{name} is not pinned" for name in ("ray", "torch", "transformers", "nixl", "boto3") if name not in pins]
    wheel = f"farspan-{PROJECT['version']}-py3-none-any.whl"
    if not any(wheel in c for c in installs) or f"dist/{wheel}" not in config["file_mounts"].values():
        found.append(f"{wheel} is not sent and installed")
    if any(re.search(r"https?://|\bwget\b|\bcurl\b", c) for c in commands):
        found.append("a setup command downloads from a bare address")
    return found


def _auth_problems(config: Config) -> list[str]:
    found = []
    if config["file_mounts"].get("~/.ray/auth_token") != "~/.ray/auth_token":
        found.append("the token is not sent to the nodes")
    written = next((c for c in config["setup_commands"] if "/etc/profile.d/farspan.sh" in c), "")
    exports = set(re.findall(r"RAY_\w+=[^\s\"]+", written))
    found += [f"{export} is not set" for export in sorted(ENVIRONMENT - exports)]
    names = {export.partition("=")[0] for export in exports}
    found += [f"RAY_{name} is not set" for name in WATCHES if f"RAY_{name}" not in names]
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [c for c in config[key] if "ray start" in c]
        if len(starts) != 1 or not starts[0].startswith(". /etc/profile.d/farspan.sh; test -s ~/.ray/auth_token &&"):
            found.append(f"{key}: Ray must start once, with the environment, and not without a token")
    head = " ".join(config["head_start_ray_commands"])
    if "--dashboard-host=127.0.0.1" not in head:
        found.append("the dashboard and the jobs API listen beyond loopback")
    return found


def test_the_cluster_file_has_no_problem() -> None:
    assert problems(load()) == []


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
    assert [name for name in WATCHES if name.encode() not in binary] == []


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
    assert "RAY_health_check_failure_threshold=5" in variables


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


@pytest.mark.parametrize(
    ("mutate", "said"),
    [
        (_set("max_worker", 3), "ray refuses it"),
        (_set("available_node_types|cpu|resource", {}), "ray refuses it"),
        (_set("head_node_type", "haed"), "ray refuses it"),
        (_set("max_workers", "many"), "ray refuses it"),
        (_set("available_node_types|cpu|min_workers", 99), "ray refuses it"),
        (_set("provider|use_internal_ip", True), "provider.use_internal_ip is not a key"),
        (_drop("provider|cache_stopped_nodes"), "provider.cache_stopped_nodes is left"),
        (_drop("setup_commands"), "setup_commands is left to Ray's defaults"),
        (_drop("head_setup_commands"), "head_setup_commands is left to Ray's defaults"),
        (_drop("available_node_types|head|node_config|IamInstanceProfile"), "head: IamInstanceProfile is left"),
        (_drop("available_node_types|decode|node_config|SecurityGroupIds"), "decode: SecurityGroupIds is left"),
        (_set("available_node_types|cpu|node_config|InstanceTyp", "m7i.large"), "EC2 has no InstanceTyp"),
        (_set("available_node_types|cpu|node_config|InstanceType", 7), "EC2 refuses it"),
        (_set("available_node_types|cpu|node_config|MetadataOptions", {"HttpTokens": "optional"}), "without a session"),
        (_set("available_node_types|cpu|labels", {"farspan role": "cpu"}), "cpu: "),
        (_drop("available_node_types|prefill"), "node type prefill is missing"),
        (_set("available_node_types|gpu-train|max_workers", 64), "max_workers is not the sum"),
        (_set("idle_timeout_minutes", 0), "idle_timeout_minutes must"),
        (_replace("setup_commands", "ray[serve,train]==2.60.0", "ray[serve,train]>=2.60"), "ray>=2.60 is not"),
        (_replace("setup_commands", "torch==2.13.0", "torch==2.12.0"), "torch==2.12.0 is not"),
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


class _Unshared(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True
