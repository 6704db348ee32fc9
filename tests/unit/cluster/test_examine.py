"""A machine with one fault is told that fault and how to mend it; a sound one is told nothing."""

import dataclasses
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from farspan.cli import cluster_doctor
from farspan.cli.cluster_doctor import gather
from farspan.cli.main import run
from farspan.cluster.examine import FAIL, OK, WARN, Finding, Gpu, MachineFacts, Reach, examine_machine
from farspan.config.cluster import ClusterSpec, SoftwareConfig
from farspan.config.load import load_config

GIB = 1 << 30
REPOSITORY = Path(__file__).resolve().parents[3]
SOFTWARE: SoftwareConfig = load_config(ClusterSpec, str(REPOSITORY / "infra" / "cluster.yaml"), []).software
SOUND = MachineFacts(
    versions={name: getattr(SOFTWARE, name) for name in ("farspan", "ray", "torch", "transformers", "nixl")},
    taken_ports={},
    shared_bytes=32 * GIB,
    memory_bytes=64 * GIB,
    disk_path="/tmp",
    disk_bytes=500 * GIB,
    disk_free_bytes=300 * GIB,
    token_mode=0o600,
    token_bytes=64,
    auth_mode="token",
    clock_synchronized=True,
    open_files=65536,
    own_address="10.0.0.4",
    reaches=(Reach("10.0.0.5:6379", None),),
    gpus=(Gpu("NVIDIA H100", "580.1"),) * 8,
    nccl="2.28.9",
)


def findings(**changed: Any) -> dict[str, Finding]:
    return {f.check: f for f in examine_machine(dataclasses.replace(SOUND, **changed), SOFTWARE)}


def test_a_sound_machine_has_only_good_findings() -> None:
    found = findings()
    assert {finding.verdict for finding in found.values()} == {OK}
    assert {finding.fix for finding in found.values()} == {""}
    assert {"ports", "shared memory", "disk", "token", "token mode", "clock", "GPU", "NCCL"} <= set(found)


@pytest.mark.parametrize(
    ("changed", "check", "verdict", "fix"),
    [
        ({"versions": SOUND.versions | {"ray": "2.59.0"}}, "version of ray", FAIL, "pip install 'ray=="),
        ({"versions": SOUND.versions | {"torch": "2.12.0"}}, "version of torch", WARN, "pip install 'torch=="),
        ({"versions": SOUND.versions | {"torch": None}}, "version of torch", FAIL, "pip install 'torch=="),
        ({"versions": SOUND.versions | {"nixl": None}}, "version of nixl", WARN, "pip install 'nixl=="),
        ({"taken_ports": {6379: "its head"}}, "port 6379", WARN, "stop what listens"),
        ({"shared_bytes": 64 << 20}, "shared memory", FAIL, "--shm-size"),
        ({"shared_bytes": 2 * GIB}, "shared memory", WARN, "19.2 GiB"),
        ({"shared_bytes": None}, "shared memory", FAIL, "mount a tmpfs"),
        ({"disk_free_bytes": 20 * GIB}, "disk", FAIL, "--temp-dir"),
        ({"disk_bytes": 20 * GIB, "disk_free_bytes": 5 * GIB}, "disk", WARN, "free space"),
        ({"open_files": 1024}, "open files", WARN, "ulimit -n 65536"),
        ({"token_mode": None}, "token", FAIL, "ray get-auth-token --generate"),
        ({"token_bytes": 0}, "token", FAIL, "ray get-auth-token --generate"),
        ({"token_mode": 0o644}, "token", FAIL, "chmod 600"),
        ({"auth_mode": "disabled"}, "token mode", FAIL, "RAY_AUTH_MODE=token"),
        ({"auth_mode": None}, "token mode", WARN, "RAY_AUTH_MODE=token"),
        ({"clock_synchronized": False}, "clock", WARN, "chrony"),
        ({"clock_synchronized": None}, "clock", WARN, "chrony"),
        ({"own_address": "127.0.1.1"}, "own address", WARN, "--node-ip-address"),
        ({"own_address": None}, "own address", WARN, "--node-ip-address"),
        ({"reaches": (Reach("h:1", "Connection refused"),)}, "reaches h:1", FAIL, "firewall"),
        ({"gpus": (Gpu("A", "1"), Gpu("B", "1"))}, "GPU", WARN, "equal devices"),
        ({"nccl": None}, "NCCL", FAIL, "torch build with CUDA"),
    ],
)
def test_a_fault_is_told_with_its_mend(changed: dict[str, Any], check: str, verdict: str, fix: str) -> None:
    found = findings(**changed)
    assert found[check].verdict == verdict
    assert fix in found[check].fix
    others = {name: f.verdict for name, f in found.items() if name != check}
    assert set(others.values()) == {OK}, others


def test_a_machine_without_a_gpu_needs_no_nccl() -> None:
    found = findings(gpus=(), nccl=None)
    assert found["GPU"].verdict == OK
    assert "NCCL" not in found


def test_torch_of_another_build_is_the_same_version() -> None:
    assert findings(versions=SOUND.versions | {"torch": f"{SOFTWARE.torch}+cpu"})["version of torch"].verdict == OK


def test_this_machine_can_be_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setattr(cluster_doctor, "PORTS", {port: "a test"})
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            nobody = unused.getsockname()[1]
        facts = gather([f"127.0.0.1:{port}", f"127.0.0.1:{nobody}"])
    assert facts.taken_ports == {port: "a test"}
    assert [reach.problem for reach in facts.reaches] == [None, "Connection refused"]
    assert facts.token_mode is None
    assert facts.memory_bytes > GIB
    assert facts.versions["ray"] == SOFTWARE.ray


def test_the_doctor_of_machines_says_json_and_fails_without_a_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    assert run(["doctor", "--cluster", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    token = next(finding for finding in report["findings"] if finding["check"] == "token")
    assert (report["ok"], token["verdict"]) == (False, "FAIL")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("canary-of-a-token", encoding="utf-8")
    (tmp_path / ".ray" / "auth_token").chmod(0o600)
    run(["doctor", "--cluster"])
    shown = capsys.readouterr().out
    assert "mode 600" in shown
    assert "canary-of-a-token" not in shown


def test_a_place_that_is_none_and_a_doctor_without_a_subject_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--cluster", "--node", "host:port"]) == 2
    assert "--node: must be HOST or HOST:PORT, got 'host:port'" in capsys.readouterr().err
    assert run(["doctor"]) == 2
    assert "MODEL: must be given, or --cluster" in capsys.readouterr().err
