"""The verbs around clusters: what they print, what they refuse, and that nothing secret leaves them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.support.commands import stand_ins
from tests.support.corpus import REPOSITORY

from farspan.cli import launch
from farspan.cli.cluster import load_spec
from farspan.cli.launch import Launched, Node, refuse_to_forget
from farspan.cli.main import run
from farspan.cli.service import build
from farspan.cluster.environment import wheel
from farspan.cluster.launcher import render_launcher
from farspan.errors import ClusterError, ConfigError

SPEC = str(REPOSITORY / "infra" / "cluster.yaml")
WHEEL = wheel(load_spec(SPEC, None).software)


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert run(list(arguments)) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.out + captured.err


def test_the_plan_shows_every_node_type_and_the_cost_of_an_hour(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "cluster", "plan", SPEC)
    assert all(name in text for name in ("head", "cpu", "gpu-train", "prefill", "decode"))
    assert "an hour costs 0.40 USD when idle" in text
    found = json.loads(said(capsys, "cluster", "plan", SPEC, "head.price_per_hour=2", "--json"))
    assert (found["least"], found["place"], len(found["nodes"])) == (2.0, "us-east-1a", 5)
    assert "its cost is not known" in said(capsys, "cluster", "plan", SPEC, "--on", "gcp")


def test_a_launcher_file_with_a_typo_in_its_provider_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text(encoding="utf-8"))
    config["provider"]["cache_stoped_nodes"] = config["provider"].pop("cache_stopped_nodes")
    file = tmp_path / "typo.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    text = said(capsys, "cluster", "validate", SPEC, "--file", str(file), code=2)
    assert "provider.cache_stoped_nodes is not a key we know: did you mean 'cache_stopped_nodes'?" in text
    assert run(["cluster", "validate", SPEC, "--file", str(file), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert len(found["problems"][str(file)]) == 3


@pytest.mark.parametrize("on", ["aws", "gcp", "local"])
def test_what_the_spec_renders_is_valid(on: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "cluster", "validate", SPEC, "--on", on) == f"the {on} file: ok\n"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (
            ["cluster", "plan", SPEC, "--on", "asw"],
            "--on: must be one of aws, gcp, local, got 'asw'; did you mean 'aws'?",
        ),
        (["cluster", "plan", SPEC, "aws.regoin=x"], "aws.regoin: is not a known key"),
        (["cluster", "plan", "none.yaml"], "no such config file"),
        (["cluster", "validate", SPEC, "--file", "none.yaml"], "no such launcher file"),
        (["cluster", "up", SPEC, "--yes"], "aws.account: must be yours"),
        (["infra", "render", SPEC, "--root", "none"], "no such folder to render into"),
        (["infra", "validate", "none"], "run farspan infra render"),
        (["infra", "validate", "--crds", "none.yaml"], "no such file of CRDs"),
        (["infra", "certs", "tls"], "--host: must be given at least once"),
    ],
)
def test_a_wrong_input_is_one_sentence(
    arguments: list[str],
    wanted: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    text = said(capsys, *arguments, code=2).strip()
    assert wanted in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("available_node_types: 3", "available_node_types must hold `key: value` lines, got 3"),
        ("provider: [aws]", "provider must hold `key: value` lines, got ['aws']"),
        ("available_node_types: {cpu: {node_config: x}}", "cpu.node_config must hold `key: value` lines, got 'x'"),
        ("setup_commands: ls", "setup_commands must be a list, got 'ls'"),
    ],
)
def test_a_launcher_file_of_another_shape_is_told_where(
    text: str, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file.yaml").write_text(text, encoding="utf-8")
    assert wanted in said(capsys, "cluster", "validate", SPEC, "--file", str(tmp_path / "file.yaml"), code=2)


@pytest.mark.parametrize("verb", ["plan", "validate"])
@pytest.mark.parametrize(("on", "fields"), [("aws", "aws.account, aws.image"), ("gcp", "gcp.project, gcp.image")])
def test_examples_are_told_before_up_refuses_them(
    verb: str, on: str, fields: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["cluster", verb, SPEC, "--on", on]) == 0
    warned = capsys.readouterr().err
    assert warned.startswith(f"warning: still examples, which farspan cluster up refuses: {fields}")
    assert len(warned.splitlines()) == 1


def test_a_file_without_a_crd_of_kuberay_checks_nothing_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some.yaml").write_text("kind: List\nitems: []\n", encoding="utf-8")
    for path in (tmp_path, tmp_path / "some.yaml"):
        text = said(capsys, "infra", "validate", "--crds", str(path), code=2)
        assert text.startswith(
            f"error: --crds: must hold CRDs of KubeRay, got '{path}'; make it by kubectl get crd ray"
        )


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed: overlays are not composed")
def test_a_tree_that_kustomize_cannot_compose_is_told_by_its_last_cause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, "infra", "render", SPEC, "--root", str(tmp_path))
    (tmp_path / "infra/k8s/base/common/account.yaml").unlink()
    text = said(capsys, "infra", "validate", str(tmp_path / "infra/k8s"), code=2)
    cause = f"got 'lstat {tmp_path}/infra/k8s/base/common/account.yaml: no such file or directory'; run farspan infra"
    assert cause in text
    assert len(text.splitlines()) == 1


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project and a home from which a cluster of machines can be started; gives where its record lies.

    `ssh` writes down where it is sent and answers, except from a machine called dead or slow.
    """
    for file in (".ssh/farspan.pem", ".ray/auth_token", "requirements.lock", f"dist/{WHEEL}"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("secret", encoding="utf-8")
        (tmp_path / file).chmod(0o600)
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/sent\ncase "$*" in\n'
        "*@dead*) echo Connection refused >&2; exit 255;;\n*@slow*) exec sleep 60;;\nesac\n"
    )
    ssh.chmod(0o755)
    stand_ins(ssh.parent, ("rsync",))
    monkeypatch.setenv("PATH", f"{ssh.parent}:/bin:/usr/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "ray"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / ".cache" / "farspan" / "clusters" / "farspan-local" / "launcher.yaml"


def remember(record: Path, *settings: str) -> str:
    """Leave the record of a cluster that was started with these settings."""
    record.parent.mkdir(parents=True)
    text = render_launcher(load_spec(SPEC, list(settings)), "local")
    record.write_text(text, encoding="utf-8")
    return text


def sent(record: Path) -> list[str]:
    """The machines `ssh` went to, in order."""
    file = record.parents[4] / "sent"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    assert all("; ray stop; }" in line for line in lines)
    return [line.partition("ubuntu@")[2].split()[0] for line in lines]


@pytest.mark.parametrize("changed", ["local.head=10.9.0.99", "local.workers=[10.9.0.11]"])
def test_a_cluster_that_runs_is_not_forgotten_for_another_of_its_name(
    changed: str, local: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = ["local.head=10.9.0.10", "local.workers=[10.9.0.11,10.9.0.12]"]
    text = remember(local, *mine)
    told = said(capsys, "cluster", "up", SPEC, *mine, changed, "--on", "local", "--yes", "--timeout", "1", code=1)
    (error,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert "its machines would be forgotten: run farspan cluster down first" in error
    assert local.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(("old", "new"), [([], []), (["local.workers=[192.0.2.11]"], [])], ids=["same", "worker more"])
def test_what_forgets_no_machine_may_be_written(old: list[str], new: list[str], local: Path) -> None:
    remember(local, *old)
    refuse_to_forget(Launched(local.parent), render_launcher(load_spec(SPEC, new), "local"))


def test_another_region_is_refused_while_machines_run_and_taken_when_they_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = Launched(tmp_path)
    launched.keep(render_launcher(load_spec(SPEC, None), "aws"))
    other = render_launcher(load_spec(SPEC, ["aws.region=eu-west-1", "aws.zone=eu-west-1a"]), "aws")
    there = [Node("i-1", "head", "10.0.0.4", "up-to-date")]
    # The provider is asked by the record, not by the new file.
    monkeypatch.setattr(launch, "nodes_of", lambda config: there if config["provider"]["region"] == "us-east-1" else [])
    with pytest.raises(ClusterError, match=r"another availability_zone, region, .* run farspan cluster down first"):
        refuse_to_forget(launched, other)
    there.clear()
    refuse_to_forget(launched, other)


def test_down_stops_ray_on_every_machine_that_stays_the_head_first_and_forgets_the_cluster(
    local: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remember(local)
    assert said(capsys, "cluster", "down", SPEC, "--on", "local", "--yes") == (
        "down: farspan, Ray is stopped on 3 machines, which stay\n"
    )
    first, *others = sent(local)
    assert (first, sorted(others)) == ("192.0.2.10", ["192.0.2.11", "192.0.2.12"])
    assert not local.exists()


def test_without_any_record_down_still_goes_to_the_machines_of_the_spec(
    local: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "Ray's record on this machine names no machine" in said(capsys, "cluster", "status", SPEC, "--on", "local")
    assert "Ray is stopped on 3 machines" in said(capsys, "cluster", "down", SPEC, "--on", "local", "--yes")
    assert len(sent(local)) == 3


def test_a_machine_that_does_not_answer_is_named_in_time_and_the_cluster_is_remembered(
    local: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remember(local, "local.workers=[dead,192.0.2.11,slow]")
    told = said(capsys, "cluster", "down", SPEC, "--on", "local", "--yes", "--timeout", "2", code=1)
    (error,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert "Ray may still run on 2 of 4 machines of farspan" in error
    assert "dead Connection refused; slow did not answer within 2 s; run it again, or delete" in error
    assert len(sent(local)) == 4
    assert local.exists()


def test_rendering_writes_what_differs_and_checking_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first = json.loads(said(capsys, "infra", "render", SPEC, "--root", str(tmp_path), "--json"))
    assert first["written"] != []
    assert sorted(first["written"]) == first["files"]
    assert said(capsys, "infra", "render", SPEC, "--root", str(tmp_path), "--check").endswith(" 0 differ\n")
    before = (tmp_path / "ray_cluster.yaml").read_bytes()
    text = said(capsys, "infra", "render", SPEC, "name=other", "--root", str(tmp_path), "--check", code=1)
    assert "differs: ray_cluster.yaml" in text
    assert (tmp_path / "ray_cluster.yaml").read_bytes() == before


def test_a_manifest_that_breaks_a_rule_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said(capsys, "infra", "render", SPEC, "--root", str(tmp_path))
    tree = tmp_path / "infra" / "k8s"
    capsys.readouterr()
    assert run(["infra", "validate", str(tree)]) == 0
    warned = capsys.readouterr().err
    assert "warning: kubernetes.model: s3://your-bucket/model is only an example" in warned
    file = tree / "base" / "cluster" / "raycluster.yaml"
    file.write_text(file.read_text().replace("mode: token", "mode: disabled"), encoding="utf-8")
    capsys.readouterr()
    assert "RayCluster farspan: authOptions must be mode token" in said(capsys, "infra", "validate", str(tree), code=2)


def test_a_tree_with_its_own_images_and_folders_is_not_warned_of(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    images = ("kubernetes.image=ghcr.io/a/farspan:1", "kubernetes.cpu_image=ghcr.io/a/farspan:1-cpu")
    folders = [f"kubernetes.{field}=s3://mine/{field}" for field in ("model", "corpus", "runs")]
    said(capsys, "infra", "render", *images, *folders, "--root", str(tmp_path))
    assert run(["infra", "validate", str(tmp_path / "infra" / "k8s")]) == 0
    assert "warning" not in capsys.readouterr().err


def test_certificates_are_written_and_their_variables_printed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = said(capsys, "infra", "certs", str(tmp_path / "tls"), "--host", "10.0.0.1")
    assert f"export RAY_TLS_CA_CERT={tmp_path}/tls/ca.crt" in text
    assert (tmp_path / "tls" / "node.key").read_text() not in text


def test_the_spec_renders_without_torch_and_without_ray() -> None:
    script = (
        "import sys; from farspan.cli.main import run; code = run(['infra', 'render', '--check']); "
        "sys.exit(code or (3 if {'torch', 'ray'} & set(sys.modules) else 0))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_the_served_application_wants_keys_and_known_arguments(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="api_key_file: must be given in Serve's config"):
        build({"model": str(tmp_path)})
    with pytest.raises(ConfigError, match="did you mean 'prefill'"):
        build({"model": str(tmp_path), "prefil": {}})
    with pytest.raises(ConfigError, match="api_key_file: must be a readable file"):
        build({"model": str(tmp_path), "api_key_file": str(tmp_path / "none")})


def test_the_served_application_takes_keys_from_a_mounted_secret(tmp_path: Path) -> None:
    keys = tmp_path / "api_keys"
    keys.write_text("canary-key-of-a-user\n", encoding="utf-8")
    keys.chmod(0o440)
    application = build({"model": str(tmp_path), "host": "0.0.0.0", "api_key_file": str(keys)})
    assert type(application).__name__ == "Application"
    assert "canary-key-of-a-user" not in repr(application._bound_deployment.init_args)
