"""Rules between the fields of a ClusterSpec: what can be refused before anything is rendered or started."""

from __future__ import annotations

import re

from farspan.config.cluster import ClusterSpec, HereConfig, NodesConfig
from farspan.errors import ConfigError

ROLES = ("head", "cpu", "train", "prefill", "decode")
_VERSION = re.compile(r"\d+(\.\d+)*((a|b|rc|\.post)\d+)?")
_FOLDER = re.compile(r"(/[\w.+-]+)+")
_PLAIN_PATH = re.compile(r"(~?/)?[\w.+-]+(/[\w.+-]+)*", re.ASCII)
# Old projects stand in a domain: example.com:my-project.
_PROJECT = re.compile(r"([a-z0-9-]+(\.[a-z0-9-]+)+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._:-]*[A-Za-z0-9])?")
_AWS_IDS = {
    "account": (r"\d{12}", "12 digits; in YAML write them in quotes"),
    "image": (r"ami-[0-9a-f]+|resolve:ssm:[\w.:/-]+", "an id that begins with ami-, or resolve:ssm:PARAMETER"),
    "subnet": (r"subnet-[0-9a-f]+", "an id that begins with subnet-"),
    "security_group": (r"sg-[0-9a-f]+", "an id that begins with sg-"),
}
_PORTS = range(1024, 65536)
_PROFILE = re.compile(r"[\w+=,.@/-]{1,128}", re.ASCII)
_ACCOUNT = re.compile(r"[a-z][a-z0-9-]{4,28}[a-z0-9]")
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")


def check_cluster(spec: ClusterSpec) -> None:
    """Refuse a spec that no cloud could make legal; one ConfigError for the first rule that is broken."""
    for field, name in (("name", spec.name), ("kubernetes.namespace", spec.kubernetes.namespace)):
        if not _NAME.fullmatch(name):
            raise ConfigError(field, "must be 1 to 40 of a-z, 0-9 and -, from a letter on", name, "use farspan")
    if not spec.up_timeout_s > 0:
        raise ConfigError("up_timeout_s", "must be above 0", spec.up_timeout_s, "use up_timeout_s=1800")
    for role in ROLES:
        _check_nodes(role, getattr(spec, role))
    if spec.head.cpus != 0 or spec.head.gpus != 0:
        value = spec.head.cpus or spec.head.gpus
        raise ConfigError("head", "must offer no CPU and no GPU: a task there could end the cluster", value, "use 0")
    if spec.environment is not None and not _FOLDER.fullmatch(spec.environment):
        raise ConfigError("environment", "must be a folder from / on, of plain letters", spec.environment, "use /opt/x")
    if spec.tls_folder is not None and not _PLAIN_PATH.fullmatch(spec.tls_folder):
        raise ConfigError("tls_folder", "must be a folder, of plain letters", spec.tls_folder, "use tls_folder=~/tls")
    _check_software(spec)
    _check_here(spec.here)
    _check_places(spec)
    _check_accounts(spec)


def _check_nodes(role: str, nodes: NodesConfig) -> None:
    for field, least in (("cpus", 0), ("gpus", 0), ("memory_gib", 1), ("disk_gib", 50), ("min_nodes", 0)):
        if getattr(nodes, field) < least:
            value = getattr(nodes, field)
            raise ConfigError(f"{role}.{field}", f"must be at least {least}", value, f"use {role}.{field}={least}")
    if nodes.max_nodes < max(1, nodes.min_nodes):
        legal = max(1, nodes.min_nodes)
        raise ConfigError(f"{role}.max_nodes", "must not be less than 1 or min_nodes", nodes.max_nodes, f"use {legal}")
    if not 1 <= nodes.idle_minutes <= 60:
        raise ConfigError(
            f"{role}.idle_minutes",
            "must lie in 1..60: an idle node is deleted",
            nodes.idle_minutes,
            f"use {role}.idle_minutes=10",
        )
    if not nodes.price_per_hour >= 0:
        raise ConfigError(f"{role}.price_per_hour", "must be at least 0", nodes.price_per_hour, "use 0 for unknown")
    if nodes.spot and role == "head":
        raise ConfigError("head.spot", "must be false: the cluster ends with its head", True, "use head.spot=false")


def _check_software(spec: ClusterSpec) -> None:
    for name, version in vars(spec.software).items():
        if not _VERSION.fullmatch(version):
            raise ConfigError(f"software.{name}", "must be one exact version", version, "write it as 2.60.0")


def _check_here(here: HereConfig) -> None:
    for field, least in (("workers", 1), ("cpus", 1), ("object_store_mib", 80)):
        if getattr(here, field) < least:
            value = getattr(here, field)
            raise ConfigError(f"here.{field}", f"must be at least {least}", value, f"use here.{field}={least}")
    for field, usual in (("port", 6379), ("dashboard_port", 8265)):
        if getattr(here, field) not in _PORTS:
            value = getattr(here, field)
            raise ConfigError(f"here.{field}", "must be a port from 1024 to 65535", value, f"use here.{field}={usual}")
    if here.port == here.dashboard_port:
        raise ConfigError("here.dashboard_port", "must not be here.port", here.port, "use here.dashboard_port=8265")


def _check_places(spec: ClusterSpec) -> None:
    # AWS also has zones outside of the region's place, like us-west-2-lax-1a and us-east-1-wl1-bos-wlz-1; Google some
    # of a kind, like us-central1-ai1a.
    endings = (("aws", r"([a-z]|(-[a-z0-9]+){2,})", "a"), ("gcp", r"-([a-z]+\d+)?[a-z]", "-a"))
    for cloud, ending, usual in endings:
        zone, region = getattr(spec, cloud).zone, getattr(spec, cloud).region
        if not re.fullmatch(re.escape(region) + ending, zone):
            way_out = f"use {cloud}.zone={region}{usual}"
            raise ConfigError(f"{cloud}.zone", f"must be a zone of {cloud}.region={region}", zone, way_out)
    for field, (legal, rule) in _AWS_IDS.items():
        if not re.fullmatch(legal, value := getattr(spec.aws, field)):
            raise ConfigError(f"aws.{field}", f"must be {rule}", value, "the console of EC2 tells it")
    if not _PROJECT.fullmatch(spec.gcp.project):
        rule = "must be the id of a project: 6 to 30 of a-z, 0-9 and -, from a letter on"
        raise ConfigError("gcp.project", rule, spec.gcp.project, "gcloud projects list tells it")
    for field, hosts in (("head", [spec.local.head]), ("workers", spec.local.workers)):
        for host in hosts:
            if not _HOST.fullmatch(host):
                rule = "must be addresses or names of machines"
                raise ConfigError(f"local.{field}", rule, host, "write it as 10.0.0.4, without user, port or slash")
    if len(set(spec.local.workers)) < len(spec.local.workers) or spec.local.head in spec.local.workers:
        raise ConfigError(
            "local.workers", "must name each machine once, without the head", spec.local.workers, "fix it"
        )
    for field in ("image", "cpu_image"):
        image = getattr(spec.kubernetes, field)
        if not is_fixed(image):
            raise ConfigError(f"kubernetes.{field}", "must name a fixed tag or digest", image, "write NAME:0.1.0")


def _check_accounts(spec: ClusterSpec) -> None:
    """Who a node is to its cloud: the head may start machines, and what runs on a worker must not be able to."""
    for cloud, field, legal, rule in (
        ("aws", "instance_profile", _PROFILE, "the name of an instance profile, not its ARN"),
        ("gcp", "service_account", _ACCOUNT, "the id of a service account, without @ and what follows"),
    ):
        section, other = getattr(spec, cloud), f"worker_{field}"
        for name in (field, other):
            value = getattr(section, name)
            if not legal.fullmatch(value):
                raise ConfigError(f"{cloud}.{name}", f"must be {rule}", value, f"write {cloud}.{name}=farspan-worker")
        if (value := getattr(section, other)) == getattr(section, field):
            rule = f"must not be {cloud}.{field}, the head's: its rights would be every worker's"
            raise ConfigError(f"{cloud}.{other}", rule, value, "make one without rights on machines and name it")


def is_fixed(image: str) -> bool:
    """Whether an image's name always means the same image: a digest, or a tag that is not `latest`."""
    return "@sha256:" in image or (":" in image.rpartition("/")[2] and not image.endswith(":latest"))
