"""An endpoint handed to a cluster is a job: it goes on when the command has left, and ends when it is stopped."""

import json
import re
from pathlib import Path

import httpx
import pytest
from tests.support.local_ray import LocalRay
from tests.unit.serve.tiny_folder import write_tiny_model

from farspan.cli.main import run
from farspan.serve.port import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
KEY = "sk-canary-of-a-key"


@pytest.mark.long
def test_an_endpoint_is_submitted_answers_to_its_key_alone_and_is_stopped_like_a_job(
    ray_cluster: LocalRay, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_model(tmp_path / "model")
    (tmp_path / "key").write_text(KEY, encoding="ascii")
    (tmp_path / "key").chmod(0o600)
    port = free_port()
    config = str(REPOSITORY / "serve" / "configs" / "local.yaml")
    settings = [f"model={tmp_path}/model", f"port={port}", f"api_key_file={tmp_path}/key", "engine.kv_bytes=16777216"]
    here = ["--cluster", ray_cluster.dashboard]
    assert run(["serve", config, *settings, *here]) == 0
    said = capsys.readouterr().out
    url = f"http://127.0.0.1:{port}/v1"
    assert f"ready: {url}  model model  key file {tmp_path}/key" in said
    # A job that never began was submitted once more: the last one is the endpoint.
    job = re.findall(r"raysubmit_\w+", said)[-1]

    assert httpx.get(f"{url}/models").status_code == 401
    assert httpx.get(f"{url}/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    assert run(["jobs", "describe", job, *here]) == 0
    described = capsys.readouterr().out
    assert json.loads(described)["status"] == "RUNNING"
    assert KEY not in described + said

    assert run(["jobs", "stop", job, *here]) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/models")


def test_what_cannot_be_served_is_refused_before_the_cluster_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(REPOSITORY / "serve" / "configs" / "local.yaml")
    assert run(["serve", config, f"model={tmp_path}/none", "--cluster", "http://192.0.2.7:8265"]) == 2
    assert "model: must be reachable from the cluster" in capsys.readouterr().err
