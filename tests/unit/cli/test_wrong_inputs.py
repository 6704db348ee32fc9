"""What a new user gets wrong on the way to a cluster is one sentence, and nothing is started."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.commands import stand_ins
from tests.support.corpus import REPOSITORY
from tests.support.disk import small_disk

from farspan.cli import here, launch
from farspan.cli.cluster import load_spec
from farspan.cli.main import run
from farspan.cluster.environment import wheel

__all__ = ["small_disk"]

SPEC = str(REPOSITORY / "infra" / "cluster.yaml")
FILLED = ["aws.account=123456789012", "aws.image=ami-1", "aws.subnet=subnet-1", "aws.security_group=sg-1"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with key and token, in a project with wheel and lock, with AWS credentials; `ray up` must not be run."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {"HOME": str(tmp_path), "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
                        "AWS_EC2_METADATA_DISABLED": "true"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    for file in (
        ".ssh/farspan.pem",
        ".ray/auth_token",
        "requirements.lock",
        f"dist/{wheel(load_spec(SPEC, []).software)}",
    ):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("x", encoding="utf-8")
        (tmp_path / file).chmod(0o600)
    monkeypatch.setenv("PATH", f"{stand_ins(tmp_path / 'bin')}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "run_launcher", lambda *given: pytest.fail("something was started"))
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """The one line a refused command says."""
    assert run(["cluster", "up", SPEC, *words]) == code
    captured = capsys.readouterr()
    (line,) = (captured.out + captured.err).splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.mark.usefixtures("home")
def test_missing_credentials(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert told(capsys, *FILLED, "--yes") == (
        "AWS credentials: must be there, got None; run aws configure, or aws sso login"
    )


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["aws.region=us-eats-1", "aws.zone=us-eats-1a"],
            "aws.region: must be a region of EC2, got 'us-eats-1'; did you mean 'us-",
        ),
        (["aws.regoin=us-east-1"], "aws.regoin: is not a known key, got 'us-east-1'; did you mean 'region'?"),
        (
            ["cpu.aws=m7i.4xlargee"],
            "cpu.aws: must be an instance type of EC2, got 'm7i.4xlargee'; did you mean 'm7i.4xlarge'? where it is",
        ),
        (["aws.subnet=sg-1"], "aws.subnet: must be an id that begins with subnet-, got 'sg-1'; the console of EC2"),
        (["aws.account=12"], "aws.account: must be 12 digits; in YAML write them in quotes, got '12'; the console"),
        (["--on", "local", "local.head=me@10.0.0.4"], "local.head: must be addresses or names of machines, got 'me@1"),
        (
            ["--on", "local", "local.head=10.0.0.4"],
            "local.workers: must be yours, and this is only an example, got '192",
        ),
        (["--on", "gcp", "gcp.project=mine-123"], "gcp.image: must be yours, and this is only an example, got 'projec"),
        (["--timeout", "0"], "Invalid value for '--timeout': "),
        (["--on", "her"], "--on: must be one of aws, gcp, local, here, got 'her'; did you mean 'here'?"),
        (["environment=opt/x"], "environment: must be a folder from / on, of plain letters, got 'opt/x'; use /opt/x"),
        (["--on", "here", "here.workers=0"], "here.workers: must be at least 1, got 0; use here.workers=1"),
        (["--on", "here", "here.port=80"], "here.port: must be a port from 1024 to 65535, got 80; use here.port=6379"),
        (["--on", "here", "here.dashboard_port=6379"], "here.dashboard_port: must not be here.port, got 6379"),
    ],
)
def test_a_typo_or_a_value_that_cannot_be(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, *FILLED, *words, "--yes").startswith(sentence)


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        (
            "AWS_PROFILE",
            "none",
            "AWS credentials: must be whole, got 'The config profile (none) could not be found'; cor",
        ),
        ("AWS_SECRET_ACCESS_KEY", None, "AWS credentials: must be whole, got 'Partial credentials found in env, miss"),
    ],
)
def test_credentials_that_are_not_whole(
    name: str, value: str | None, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv(name, value)
    assert told(capsys, *FILLED, "--yes").startswith(sentence)


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("words", [["status"], ["down", "--yes"], ["up", *FILLED, "--yes"]], ids=lambda words: words[0])
def test_a_cloud_that_does_not_answer_is_told_at_once(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        assert run(["cluster", words[0], SPEC, *words[1:]]) == 1
    assert capsys.readouterr().err == (
        "error: EC2 does not answer: the cloud's API cannot be reached; check region and network\n"
    )


def test_a_public_key_is_not_taken_for_the_private_one(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / ".ssh" / "farspan.pem").write_text("ssh-ed25519 AAAA me\n", encoding="ascii")
    assert told(capsys, *FILLED, "--yes") == (
        "aws.ssh_private_key: must be the private half, got '~/.ssh/farspan.pem'; name the file without .pub"
    )


@pytest.mark.parametrize(
    ("record", "words", "sentence"),
    [
        ("farspan-here/nodes.json", ["status", SPEC, "--on", "here"], "is not the record of nodes that it should be"),
        ("farspan-aws/launcher.yaml", ["status", SPEC], "is not the launcher file that it should be; delete it"),
    ],
)
def test_a_record_that_is_broken(
    record: str, words: list[str], sentence: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = home / ".cache" / "farspan" / "clusters" / record
    file.parent.mkdir(parents=True)
    file.write_text("[1", encoding="ascii")
    assert run(["cluster", *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {file}: {sentence}")


@pytest.mark.parametrize("words", [["--on", "here"], [*FILLED, "--yes"]], ids=["here", "aws"])
def test_a_folder_that_cannot_be_made(
    words: list[str], home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "ask_cloud", lambda provider: None)
    # Somebody else may hold a port of this machine.
    monkeypatch.setattr(here, "_refuse_taken", lambda name, port: None)
    (home / ".cache").touch()
    assert run(["cluster", "up", SPEC, *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("could not be written: Not a directory; make its folder one that you may write to")


def test_a_group_without_a_command_shows_its_help_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["infra"]) == 2
    captured = capsys.readouterr()
    assert "render" in captured.out
    assert captured.err == ""


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize("field", ["port", "dashboard_port"])
def test_a_taken_port(field: str, taken: int, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        free = other.getsockname()[1]
    ports = {"port": free, "dashboard_port": free} | {field: taken}
    said = told(capsys, *(f"here.{name}={port}" for name, port in ports.items()), "--on", "here")
    assert said == (
        f"here.{field}: must be a free port of this machine, got {taken}; stop what listens there, or use "
        f"here.{field}={taken + 1}"
    )
    assert not (home / ".cache/farspan/clusters/farspan-here/nodes.json").exists()


@pytest.mark.parametrize("words", [["--on", "here"], [*FILLED, "--yes"]], ids=["here", "aws"])
def test_no_space(
    words: list[str], home: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / ".cache").symlink_to(small_disk)
    said = told(capsys, *words, code=1)
    assert "only 0 MiB are free of the 1024 needed; free space" in said
    assert list(small_disk.iterdir()) == []


@pytest.mark.usefixtures("home")
def test_ending_what_never_ran_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cluster", "down", SPEC, "--on", "here"]) == 0
    assert capsys.readouterr().out == "no node of farspan runs here\n"
    assert run(["cluster", "status", SPEC, "--on", "here"]) == 0
    assert capsys.readouterr().out == "no machine of farspan runs\n"
