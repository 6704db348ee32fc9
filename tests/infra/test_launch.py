"""`farspan cluster up` against EC2's API (moto, on the loopback) and hosts that never answer: it ends, says why, and
`down` leaves no machine. Nothing leaves this machine: the subnet lies in 127.0.0.0/8."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.canary import ProcessWatch
from tests.support.commands import stand_ins
from tests.support.s3 import S3Server

from farspan.cli.main import run
from farspan.cluster.environment import wheel
from farspan.config.cluster import ClusterSpec
from farspan.config.load import load_config

boto3 = pytest.importorskip("boto3", reason="boto3 is not installed: Ray's launcher cannot talk to EC2")

REPOSITORY = Path(__file__).resolve().parents[2]
SPEC = str(REPOSITORY / "infra" / "cluster.yaml")
CANARY = "canary-of-a-token-5b1e"
# `ray up` starts in about 20 s on a busy machine; then it would wait for SSH for ever. Twice that and more is room.
_UP_S = 120
_END_S = 120
_REGION = "us-east-1"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_server: S3Server) -> Path:
    """A project and a home that are ready to start a cluster, with the mocked cloud as AWS."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {"HOME": str(tmp_path), "AWS_ENDPOINT_URL": s3_server.endpoint, "AWS_DEFAULT_REGION": _REGION,
                        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "COLUMNS": "200",
                        "AWS_EC2_METADATA_DISABLED": "true",
                        "PATH": f"{os.environ['PATH']}:{stand_ins(tmp_path / 'bin')}"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    software = load_config(ClusterSpec, SPEC, []).software
    for file in (".ssh/farspan.pem", ".ray/auth_token", "requirements.lock", f"dist/{wheel(software)}"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(CANARY, encoding="utf-8")
        (tmp_path / file).chmod(0o600)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ec2(home: Path) -> Iterator[Any]:
    client = boto3.client("ec2")
    yield client
    if left := running(client):
        client.terminate_instances(InstanceIds=left)


@pytest.fixture
def settings(ec2: Any) -> list[str]:
    """The ids of what a user brings, made in the mocked cloud."""
    vpc = ec2.create_vpc(CidrBlock="127.77.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="127.77.0.0/24", AvailabilityZone="us-east-1a")["Subnet"][
        "SubnetId"
    ]
    group = ec2.create_security_group(GroupName=f"farspan-{time.time_ns()}", Description="d", VpcId=vpc)["GroupId"]
    image = ec2.describe_images()["Images"][0]["ImageId"]
    iam = boto3.client("iam")
    if not iam.list_instance_profiles()["InstanceProfiles"]:
        for name in ("farspan-head", "farspan-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
    return ["aws.account=123456789012", f"aws.image={image}", f"aws.subnet={subnet}", f"aws.security_group={group}"]


def running(ec2: Any) -> list[str]:
    found = ec2.describe_instances()["Reservations"]
    instances = [instance for reservation in found for instance in reservation["Instances"]]
    return [i["InstanceId"] for i in instances if i["State"]["Name"] in ("pending", "running")]


class _Watch(ProcessWatch):
    """Counts the launchers of a home as well."""

    def __init__(self, word: str, home: Path) -> None:
        super().__init__([word])
        self._home = home
        self.launchers = 0

    def look(self) -> None:
        super().look()
        self.launchers = max(self.launchers, len(launchers(self._home, command_lines())))


def command_lines() -> list[bytes]:
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(file.read_bytes())
        except OSError:
            continue
    return lines


def launchers(home: Path, lines: list[bytes]) -> list[bytes]:
    """Those that drive a launcher file of this home: others may start clusters on this machine too."""
    return [line for line in lines if str(home).encode() in line and b"launcher.yaml" in line]


@pytest.fixture
def watch(home: Path) -> Iterator[_Watch]:
    with _Watch(CANARY, home) as watching:
        yield watching


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("ssh") is None, reason="ssh is not installed: Ray's launcher cannot ask the head")
def test_a_cluster_that_cannot_come_up_ends_in_time_says_why_and_goes_down(
    home: Path, ec2: Any, settings: list[str], watch: _Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert running(ec2) == []
    begin = time.monotonic()
    assert run(["cluster", "up", SPEC, *settings, "--yes", "--timeout", str(_UP_S)]) == 1
    assert time.monotonic() - begin < _UP_S + _END_S
    captured = capsys.readouterr()
    (error,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    # Where this machine's own SSH server listens on every address, it answers in the head's place, and refuses.
    causes = ("does not answer SSH", "refuses the SSH key")
    assert any(f"ray up did not end within {_UP_S} s: the head {cause}" in error for cause in causes), error
    assert "an hour costs" in captured.out
    watch.stop()
    assert watch.launchers > 0
    assert launchers(home, command_lines()) == [], "the launcher goes on"

    # The token is in no command line or environment, and in no file this machine kept of the cluster.
    assert watch.seen == set()
    kept = [file for file in (home / ".cache").rglob("*") if file.is_file()]
    assert {file.name for file in kept} >= {"launcher.yaml", "launcher.log"}
    assert [file for file in kept if CANARY.encode() in file.read_bytes()] == []
    assert CANARY not in captured.out + captured.err

    assert len(running(ec2)) == 1
    assert run(["cluster", "status", SPEC, "--json"]) == 0
    (node,) = json.loads(capsys.readouterr().out)["nodes"]
    assert (node["node_type"], node["id"]) == ("head", running(ec2)[0])
    assert node["address"].startswith("127.77.0.")

    # Another region has no such machine: its file would forget this one.
    there = ["aws.region=us-west-2", "aws.zone=us-west-2a"]
    assert run(["cluster", "up", SPEC, *settings, *there, "--yes"]) == 1
    assert "its machines would be forgotten: run farspan cluster down first" in capsys.readouterr().err

    assert run(["cluster", "down", SPEC, "--yes"]) == 0
    assert capsys.readouterr().out == "down: farspan, 1 machines\n"
    assert running(ec2) == []
    assert run(["cluster", "down", SPEC, "--yes"]) == 0
    assert capsys.readouterr().out == "no machine of farspan runs\n"


def test_ids_that_the_cloud_does_not_know_are_one_sentence(
    settings: list[str], ec2: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [s for s in settings if not s.startswith("aws.subnet=")] + ["aws.subnet=subnet-1234567890abcdef0"]
    assert run(["cluster", "up", SPEC, *wrong, "name=other", "--yes", "--timeout", "300"]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "set aws.subnet" in error
    assert running(ec2) == []


def test_without_somebody_to_ask_nothing_is_started(
    settings: list[str], ec2: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["cluster", "up", SPEC, *settings]) == 2
    assert "--yes: must be given where nobody can answer" in capsys.readouterr().err
    assert running(ec2) == []
