"""Whether a machine can be a node of a cluster: facts in, findings out, each with the way to mend it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from farspan.config.cluster import SoftwareConfig

OK, WARN, FAIL = "OK", "WARN", "FAIL"
_GIB = 1 << 30
# Ray writes objects to disk where shared memory ends, and refuses work on a disk that is fuller than this.
_SHARED_SHARE = 0.3
_FULL_SHARE = 0.95
_LEAST_SHARED_BYTES = 256 << 20
_LEAST_OPEN_FILES = 65536
_PUBLIC_MODE = 0o077


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor; `fix` is empty where nothing is wrong."""

    check: str
    verdict: str
    found: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Reach:
    """A place that was tried: `problem` is None when it answered."""

    place: str
    problem: str | None
    way_out: str = "check name, firewall and security group; is Ray's head up?"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device, as its driver names it."""

    name: str
    driver: str


@dataclass(frozen=True, kw_only=True)
class MachineFacts:
    """What was seen of a machine; None: it could not be asked."""

    versions: dict[str, str | None]
    taken_ports: dict[int, str]
    """Port to what it is for, of those that Ray and Serve need and somebody holds."""
    shared_bytes: int | None
    memory_bytes: int
    disk_path: str
    disk_bytes: int
    disk_free_bytes: int
    token_mode: int | None
    """Permissions of the token's file; None: there is none."""
    token_bytes: int
    auth_mode: str | None
    """RAY_AUTH_MODE of this process."""
    clock_synchronized: bool | None
    open_files: int
    own_address: str | None
    """What this machine's name resolves to."""
    reaches: tuple[Reach, ...]
    gpus: tuple[Gpu, ...]
    nccl: str | None
    """Version of NCCL that torch brings."""


def examine_machine(facts: MachineFacts, software: SoftwareConfig) -> list[Finding]:
    """Every finding, in the order of a start: versions, ports, memory, disk, token, clock, network, devices."""
    return [
        *_versions(facts, software),
        *_ports(facts),
        _shared_memory(facts),
        _disk(facts),
        _open_files(facts),
        *_token(facts),
        _clock(facts),
        _address(facts),
        *_reaches(facts),
        *_devices(facts),
    ]


def _versions(facts: MachineFacts, software: SoftwareConfig) -> Iterator[Finding]:
    for name in ("farspan", "ray", "torch", "transformers", "nixl"):
        wanted, found = getattr(software, name), facts.versions.get(name)
        check, bare = f"version of {name}", (found or "").partition("+")[0]
        if found is None and name == "nixl":
            without = "not installed; KV pages travel by Ray's object store, and transfer.transport=nixl is refused"
            yield Finding(check, WARN, without, f"pip install '{name}=={wanted}'")
        elif found is None:
            yield Finding(check, FAIL, "not installed", f"pip install '{name}=={wanted}'")
        elif bare == wanted:
            yield Finding(check, OK, found)
        else:
            # Ray's processes only talk to their own version.
            verdict = FAIL if name == "ray" else WARN
            yield Finding(check, verdict, f"{found}, the cluster has {wanted}", f"pip install '{name}=={wanted}'")


def _ports(facts: MachineFacts) -> Iterator[Finding]:
    if not facts.taken_ports:
        yield Finding("ports", OK, "free")
    for port, use in facts.taken_ports.items():
        yield Finding(
            f"port {port}", WARN, f"taken; Ray needs it for {use}", "fine on a running node, else stop what listens"
        )


def _shared_memory(facts: MachineFacts) -> Finding:
    if facts.shared_bytes is None:
        return Finding("shared memory", FAIL, "no /dev/shm", "mount a tmpfs there")
    wanted = _SHARED_SHARE * facts.memory_bytes
    found = f"{_gib(facts.shared_bytes)} of {_gib(facts.memory_bytes)} memory"
    fix = f"give /dev/shm {_gib(wanted)}: docker run --shm-size, or an emptyDir of medium Memory"
    if facts.shared_bytes < _LEAST_SHARED_BYTES:
        return Finding("shared memory", FAIL, found, fix)
    return (
        Finding("shared memory", WARN, found, fix)
        if facts.shared_bytes < wanted
        else Finding("shared memory", OK, found)
    )


def _disk(facts: MachineFacts) -> Finding:
    found = f"{_gib(facts.disk_free_bytes)} of {_gib(facts.disk_bytes)} free at {facts.disk_path}"
    fix = "free space, or start Ray with --temp-dir on a larger disk"
    if facts.disk_free_bytes < (1 - _FULL_SHARE) * facts.disk_bytes or facts.disk_free_bytes < _GIB:
        return Finding("disk", FAIL, found, fix)
    return Finding("disk", WARN, found, fix) if facts.disk_free_bytes < 10 * _GIB else Finding("disk", OK, found)


def _open_files(facts: MachineFacts) -> Finding:
    if facts.open_files >= _LEAST_OPEN_FILES:
        return Finding("open files", OK, str(facts.open_files))
    return Finding("open files", WARN, str(facts.open_files), f"ulimit -n {_LEAST_OPEN_FILES} before ray start")


def _token(facts: MachineFacts) -> Iterator[Finding]:
    if facts.token_mode is None or facts.token_bytes == 0:
        yield Finding("token", FAIL, "none: Ray would start open to the network", "ray get-auth-token --generate")
    elif facts.token_mode & _PUBLIC_MODE:
        yield Finding("token", FAIL, f"readable by others, mode {facts.token_mode:o}", "chmod 600 ~/.ray/auth_token")
    else:
        yield Finding("token", OK, f"mode {facts.token_mode:o}")
    if facts.auth_mode == "disabled":
        yield Finding("token mode", FAIL, "RAY_AUTH_MODE=disabled", "export RAY_AUTH_MODE=token")
    elif facts.auth_mode is None:
        yield Finding("token mode", WARN, "not set", "export RAY_AUTH_MODE=token: without it a lost token opens Ray")
    else:
        yield Finding("token mode", OK, facts.auth_mode)


def _clock(facts: MachineFacts) -> Finding:
    if facts.clock_synchronized is None:
        return Finding("clock", WARN, "the kernel does not say", "make sure that chrony or timesyncd runs")
    if not facts.clock_synchronized:
        return Finding("clock", WARN, "not synchronized", "start chrony or timesyncd: certificates and leases need it")
    return Finding("clock", OK, "synchronized")


def _address(facts: MachineFacts) -> Finding:
    if facts.own_address is None:
        return Finding("own address", WARN, "its name does not resolve", "ray start --node-ip-address=ADDRESS")
    if facts.own_address.startswith("127."):
        return Finding(
            "own address", WARN, facts.own_address, "ray start --node-ip-address=ADDRESS, or mend /etc/hosts"
        )
    return Finding("own address", OK, facts.own_address)


def _reaches(facts: MachineFacts) -> Iterator[Finding]:
    for reach in facts.reaches:
        if reach.problem is None:
            yield Finding(f"reaches {reach.place}", OK, "answers")
        else:
            yield Finding(f"reaches {reach.place}", FAIL, reach.problem, reach.way_out)


def _devices(facts: MachineFacts) -> Iterator[Finding]:
    if not facts.gpus:
        yield Finding("GPU", OK, "none: a CPU node")
        return
    names = {gpu.name for gpu in facts.gpus}
    drivers = {gpu.driver for gpu in facts.gpus}
    verdict, fix = (OK, "") if len(names) == 1 else (WARN, "processes that share a sequence want equal devices")
    yield Finding("GPU", verdict, f"{len(facts.gpus)} x {', '.join(sorted(names))}, driver {min(drivers)}", fix)
    if facts.nccl is None:
        yield Finding("NCCL", FAIL, "torch has none", "install the torch build with CUDA")
    else:
        yield Finding("NCCL", OK, facts.nccl)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.1f} GiB"
