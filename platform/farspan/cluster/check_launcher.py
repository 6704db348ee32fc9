"""Everything wrong with a file for Ray's cluster launcher that Ray itself does not look for. No Ray, no network.

Ray checks the top of the file; it lets misspelt provider and node keys pass, and fills what is missing from defaults
that open ports, widen roles and install nightly builds. Each problem is one sentence.
"""

from __future__ import annotations

import difflib
import functools
import posixpath
import re
from collections.abc import Iterator
from typing import Any

import botocore.session
import botocore.validate

from farspan.cluster.environment import AUTH, HABITS, TLS_FILES, WATCHES, requirements, tls_switches, wheel
from farspan.cluster.launcher import NODE_TYPES
from farspan.cluster.secrets import holds_secret
from farspan.config.cluster import SoftwareConfig
from farspan.config.load import nearest

Config = dict[str, Any]

PROVIDER_KEYS = {
    "aws": ("type", "region", "availability_zone", "use_internal_ips", "cache_stopped_nodes"),
    "gcp": ("type", "region", "availability_zone", "project_id", "use_internal_ips", "cache_stopped_nodes"),
    "local": ("type", "head_ip", "worker_ips"),
}
# Left out, each of these is filled from Ray's defaults.
_EXPLICIT_KEYS = (
    "cluster_name", "max_workers", "upscaling_speed", "idle_timeout_minutes", "provider", "auth", "file_mounts",
    "cluster_synced_files", "file_mounts_sync_continuously", "rsync_exclude", "rsync_filter", "initialization_commands",
    "setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands",
    "worker_start_ray_commands",
)  # fmt: skip
_SECTIONS = ("provider", "auth", "file_mounts", "available_node_types")
_NODE_TYPE_KEYS = ("head_node_type", "available_node_types")
_NODE_KEYS = {
    "aws": (
        "InstanceType", "ImageId", "KeyName", "IamInstanceProfile", "SubnetIds", "SecurityGroupIds", "MetadataOptions",
        "BlockDeviceMappings",
    ),
    "gcp": ("machineType", "networkInterfaces", "serviceAccounts", "disks"),
}  # fmt: skip
_GCP_NODE_KEYS = (*_NODE_KEYS["gcp"], "scheduling", "guestAccelerators", "labels", "tags", "metadata")
_START = ". /etc/profile.d/farspan.sh; test -s ~/.ray/auth_token &&"
_MOST_IDLE_MINUTES = 60


def shape_problems(config: Config) -> list[str]:
    """Sections that are no sections, lists that are no lists: Ray would fail on them without saying where."""
    types = config.get("available_node_types")
    nodes = {f"available_node_types.{name}": node for name, node in types.items()} if isinstance(types, dict) else {}
    nodes |= {f"{name}.node_config": node.get("node_config") for name, node in nodes.items() if isinstance(node, dict)}
    sections = {key: config.get(key) for key in _SECTIONS} | nodes
    lists = {key: config.get(key) for key in _EXPLICIT_KEYS if key.endswith("_commands")}
    return [
        *(
            f"{key} must hold `key: value` lines, got {value!r}"
            for key, value in sections.items()
            if _other(value, dict)
        ),
        *(f"{key} must be a list, got {value!r}" for key, value in lists.items() if _other(value, list)),
    ]


def _other(value: object, kind: type) -> bool:
    return value is not None and not isinstance(value, kind)


def launcher_problems(config: Config, software: SoftwareConfig) -> list[str]:
    """One sentence for each thing that is wrong; `software` says which versions the file must install."""
    provider = config.get("provider")
    kind = provider.get("type") if isinstance(provider, dict) else None
    if not isinstance(provider, dict) or kind not in PROVIDER_KEYS:
        return [f"provider.type must be one of {', '.join(PROVIDER_KEYS)}, got {kind!r}"]
    wanted = _EXPLICIT_KEYS if kind == "local" else (*_EXPLICIT_KEYS, *_NODE_TYPE_KEYS)
    if missing := [key for key in wanted if key not in config]:
        return [f"{key} is left to Ray's defaults" for key in missing]
    return [
        *_provider_problems(provider, PROVIDER_KEYS[kind]),
        *([] if kind == "local" else _node_problems(config, kind)),
        *_limit_problems(config, kind),
        *_pin_problems(config, software, kind),
        *_auth_problems(config),
        *(["a secret stands in the file"] if holds_secret(config) else []),
    ]


def _provider_problems(provider: Config, known: tuple[str, ...]) -> Iterator[str]:
    for key in sorted(set(provider) - set(known)):
        yield f"provider.{key} is not a key we know: {nearest(str(key), list(known))}"
    for key in sorted(set(known) - set(provider)):
        yield f"provider.{key} is left to Ray's defaults"


def _node_problems(config: Config, kind: str) -> Iterator[str]:
    node_types = config["available_node_types"]
    yield from (f"node type {name} is missing" for name in NODE_TYPES if name not in node_types)
    for name, node_type in node_types.items():
        node = dict(node_type.get("node_config", {}))
        yield from (f"{name}: {key} is left to Ray's defaults" for key in _NODE_KEYS[kind] if key not in node)
        if "CPU" not in node_type.get("resources", {}):
            yield f"{name}: its CPUs are left to a look-up"
        if kind == "aws":
            yield from (f"{name}: {problem}" for problem in _ec2_problems(node))
        else:
            yield from (f"{name}: {problem}" for problem in _gce_problems(node))
    yield from _account_problems(config, kind)


def _account_problems(config: Config, kind: str) -> Iterator[str]:
    """Workers that are to their cloud who the head is."""
    key = {"aws": "IamInstanceProfile", "gcp": "serviceAccounts"}[kind]
    accounts = {
        name: _accounts(node.get("node_config", {}).get(key)) for name, node in config["available_node_types"].items()
    }
    heads = accounts.pop(config["head_node_type"])
    for name, account in accounts.items():
        if account & heads:
            yield f"{name}: it has the head's {key}, which may start and end machines"


def _accounts(written: Any) -> set[str]:
    """Who a node is: names of its instance profile, also by its ARN, or the addresses of its service accounts."""
    if isinstance(written, dict):
        return {str(value).rpartition("/")[2] for name, value in written.items() if name in ("Arn", "Name")}
    accounts = written if isinstance(written, list) else []
    return {str(account.get("email")) for account in accounts if isinstance(account, dict)}


def ec2_machines() -> frozenset[str]:
    """Instance types that this botocore knows."""
    return frozenset(_run_instances().members["InstanceType"].enum)


def no_machine(name: str) -> str:
    """What to do about an instance type that is none."""
    near = difflib.get_close_matches(name, ec2_machines(), n=1)
    newer = "where it is newer than this boto3, pip install --upgrade boto3"
    return f"did you mean {near[0]!r}? {newer}" if near else newer


@functools.cache
def _run_instances() -> Any:
    """EC2's own description of the request that starts an instance; megabytes of JSON, read once."""
    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _ec2_problems(node: Config) -> Iterator[str]:
    shape = _run_instances()
    # SubnetIds is Ray's own key: it picks one of them.
    request = {key: value for key, value in node.items() if key != "SubnetIds"} | {"MinCount": 1, "MaxCount": 1}
    # botocore lets unknown keys pass at the top of a request unless they are looked for.
    for key in sorted(set(request) - set(shape.members)):
        yield f"EC2 has no {key}: {nearest(key, [*shape.members])}"
    report = botocore.validate.ParamValidator().validate(request, shape)
    if report.has_errors():
        yield f"EC2 refuses it: {report.generate_report()}"
    machine = node.get("InstanceType")
    if isinstance(machine, str) and machine not in ec2_machines():
        yield f"EC2 has no {machine}: {no_machine(machine)}"
    for volume in node.get("BlockDeviceMappings", []):
        if volume.get("Ebs", {}).get("Encrypted") is not True:
            yield "a disk is not encrypted"
    options = node.get("MetadataOptions")
    if not isinstance(options, dict) or options.get("HttpTokens") != "required":
        yield "the instance metadata can be read without a session token"


def _gce_problems(node: Config) -> Iterator[str]:
    for key in sorted(set(node) - set(_GCP_NODE_KEYS)):
        yield f"Compute Engine's {key} is not a key we know: {nearest(key, list(_GCP_NODE_KEYS))}"
    for interface in node.get("networkInterfaces", []):
        if "accessConfigs" in interface:
            yield "it gets a public address (accessConfigs)"


def _limit_problems(config: Config, kind: str) -> Iterator[str]:
    if not 0 < config["idle_timeout_minutes"] <= _MOST_IDLE_MINUTES:
        yield f"idle_timeout_minutes must lie in 1..{_MOST_IDLE_MINUTES}"
    if kind == "local":
        return
    workers = {name: t for name, t in config["available_node_types"].items() if name != config["head_node_type"]}
    yield from (f"{name}: max_workers is missing" for name, t in workers.items() if "max_workers" not in t)
    if sum(t.get("max_workers", 0) for t in workers.values()) != config["max_workers"]:
        yield "max_workers is not the sum of the node types"
    if config["provider"].get("cache_stopped_nodes", True):
        yield "idle nodes are stopped and go on costing their disks"
    for name, node_type in workers.items():
        if not 0 < node_type.get("idle_timeout_s", 0) <= 60 * _MOST_IDLE_MINUTES:
            yield f"{name}: idle_timeout_s must lie in 1..{60 * _MOST_IDLE_MINUTES}"


def _pin_problems(config: Config, software: SoftwareConfig, kind: str) -> Iterator[str]:
    commands = [c for key in ("setup_commands", "head_setup_commands", "worker_setup_commands") for c in config[key]]
    installs = " ".join(c for c in commands if "pip install" in c or "-m farspan.cluster.image" in c)
    cloud = {"aws": [f"boto3=={software.boto3}"], "gcp": [f"google-api-python-client=={software.google_api}"]}
    wanted = [*requirements(software), *cloud.get(kind, [])]
    found = re.findall(r"'([^']+)'", installs)
    yield from (f"{requirement} is not pinned" for requirement in wanted if requirement not in found)
    yield from (f"{requirement} is not in the spec" for requirement in found if requirement not in wanted)
    if wheel(software) not in installs or f"dist/{wheel(software)}" not in config["file_mounts"].values():
        yield f"{wheel(software)} is not sent and installed"
    if any(re.search(r"https?://|\bwget\b|\bcurl\b", command) for command in commands):
        yield "a setup command downloads from a bare address"


def _tls_problems(mounts: Config, exports: dict[str, str]) -> Iterator[str]:
    """A node with half of what TLS needs cannot speak to the others; one with the authority's key could make nodes."""
    if any(str(source).endswith("ca.key") for source in mounts.values()):
        yield "the authority's key (ca.key) is sent to the nodes"
    for target, source in mounts.items():
        _, folder, file = posixpath.normpath(str(target)).partition("/farspan-tls")
        if folder and file[:1] in ("", "/") and file[1:] not in TLS_FILES:
            yield f"{target} is sent to the nodes, where only {', '.join(TLS_FILES)} may be: a folder holds ca.key too"
        if any(posixpath.dirname(str(mounts.get(f"~/farspan-tls/{name}"))) == str(source) for name in TLS_FILES):
            yield f"{source} is sent to the nodes, and holds the authority's key (ca.key)"
    wanted = tls_switches("$HOME/farspan-tls")
    if not set(wanted) & set(exports):
        return
    yield from (f"{name}={value} is not set" for name, value in wanted.items() if exports.get(name) != value)
    for file in TLS_FILES:
        if f"~/farspan-tls/{file}" not in mounts:
            yield f"{file} is not sent to the nodes"


def _auth_problems(config: Config) -> Iterator[str]:
    if config["file_mounts"].get("~/.ray/auth_token") != "~/.ray/auth_token":
        yield "the token is not sent to the nodes"
    written = next((c for c in config["setup_commands"] if "/etc/profile.d/farspan.sh" in c), "")
    exports = dict(re.findall(r"(RAY_\w+)=([^\s\"]+)", written))
    for name, value in {**AUTH, "RAY_AUTH_TOKEN_PATH": "$HOME/.ray/auth_token", **HABITS}.items():
        if exports.get(name) != value:
            yield f"{name}={value} is not set"
    yield from (f"{name} is not set" for name in WATCHES if name not in exports)
    yield from _tls_problems(config["file_mounts"], exports)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config[key] if "ray start" in command]
        if len(starts) != 1 or not starts[0].startswith(_START):
            yield f"{key}: Ray must start once, with the environment, and not without a token"
    if "--dashboard-host=127.0.0.1" not in " ".join(config["head_start_ray_commands"]):
        yield "the dashboard and the jobs API listen beyond loopback"
