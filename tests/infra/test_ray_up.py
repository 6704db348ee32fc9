"""`ray_cluster.yaml` from `ray up` to `ray down`: EC2's API is moto's, its machines are hosts that answer SSH.

What differs from the committed file is what a user brings: ids, key, and an image that holds the packages.
"""

import json
import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from tests.support.canary import ProcessWatch, files_with
from tests.support.cloud import KEYS, Cloud, cloud
from tests.support.corpus import small_corpus
from tests.support.runs import TINY

from farspan.cluster.environment import wheel
from farspan.cluster.launcher import render_launcher
from farspan.config.cluster import ClusterSpec
from farspan.config.load import load_config

pytest.importorskip("boto3", reason="boto3 is not installed: Ray's launcher cannot talk to EC2")

REPOSITORY = Path(__file__).resolve().parents[2]
SPEC = str(REPOSITORY / "infra" / "cluster.yaml")
TOKEN, KEY = "f" * 63 + "0", "sk-canary-of-an-endpoint"
SECRETS = (TOKEN, KEY, KEYS["AWS_SECRET_ACCESS_KEY"])
_UP_S, _WORK_S, _DOWN_S = 240.0, 300.0, 120.0
# Keys of the file that hold what a user brings, or how packages get onto the machines.
_BROUGHT = {"ImageId", "Arn", "SubnetIds", "SecurityGroupIds", "ssh_user", "ssh_private_key"}
_INSTALLS = {"setup_commands", "head_setup_commands"}


def differing(one: Any, other: Any, key: str = "") -> set[str]:
    """Innermost keys under which two files differ; a list counts as one value."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {k for name in one.keys() | other.keys() for k in differing(one.get(name), other.get(name), name)}
    return set() if one == other else {key}


class User:
    """Somebody in a project folder with the token, the wheel and the key, who types commands."""

    def __init__(self, folder: Path, there: Cloud) -> None:
        self.folder, self._there = folder, there
        for name in (".ray", "dist", "tmp"):
            (folder / name).mkdir()
        for file, text in ((".ray/auth_token", TOKEN), ("api_key", KEY)):
            (folder / file).write_text(text, encoding="ascii")
            (folder / file).chmod(0o600)
        shutil.copy(REPOSITORY / "requirements.lock", folder)
        build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder / "dist")]
        subprocess.run([*build, str(REPOSITORY)], check=True, timeout=_WORK_S)
        assert [made.name for made in (folder / "dist").iterdir()] == [
            wheel(load_config(ClusterSpec, SPEC, []).software)
        ]

    @property
    def environment(self) -> dict[str, str]:
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("AWS_", "RAY_")) and not n.endswith("_proxy")}
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
        # Ray's launcher writes what it sends into the temporary folder first.
        own = {"HOME": str(self.folder), "TMPDIR": str(self.folder / "tmp"), "PATH": path, "COLUMNS": "200"}
        return {**kept, **self._there.environment, **own}

    def farspan(self, *words: str, timeout_s: float) -> str:
        """Everything a command said; it must succeed."""
        begin = time.monotonic()
        answer = subprocess.run(
            [sys.executable, "-m", "farspan.cli.main", *words],
            cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=timeout_s, check=False,
        )  # fmt: skip
        print(f"{time.monotonic() - begin:.0f} s: farspan {' '.join(words[:2])}")
        assert answer.returncode == 0, answer.stdout + answer.stderr + self.launcher_log()
        assert TOKEN not in answer.stdout + answer.stderr
        return answer.stdout

    @property
    def launched(self) -> Path:
        return self.folder / ".cache" / "farspan" / "clusters" / "farspan-aws"

    def launcher_log(self) -> str:
        log = self.launched / "launcher.log"
        return log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""

    @contextmanager
    def dashboard(self) -> Iterator[str]:
        """`ray dashboard`: the head's jobs API on this machine's loopback, as the docs say."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "ray.scripts.scripts", "dashboard", "--port", str(port)]
        tunnel = subprocess.Popen(
            [*command, str(self.launched / "launcher.yaml")],
            env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            address, ends = f"http://127.0.0.1:{port}", time.monotonic() + _UP_S
            while not answers(address):
                assert time.monotonic() < ends
                assert tunnel.poll() is None
                time.sleep(0.2)
            yield address
        finally:
            os.killpg(tunnel.pid, 15)
            tunnel.wait(30)


def answers(address: str) -> bool:
    try:
        return httpx.get(address, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def kinds(there: Cloud) -> list[str]:
    tags = [{tag["Key"]: tag["Value"] for tag in instance["Tags"]} for instance in there.running()]
    return sorted(found["ray-user-node-type"] for found in tags)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_ray_up_of_the_committed_file_trains_and_serves_on_a_machine_it_launches_tells_no_secret_and_leaves_none(
    tmp_path: Path,
) -> None:
    # What a process must have in its environment to reach S3 is not looked for there.
    with cloud(2) as there, ProcessWatch(SECRETS, in_environments=[TOKEN, KEY]) as watch:
        settings = there.bring()
        rendered = yaml.safe_load(render_launcher(load_config(ClusterSpec, SPEC, settings), "aws"))
        committed = yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text(encoding="utf-8"))
        assert differing(committed, rendered) == _BROUGHT | _INSTALLS

        user = User(tmp_path, there)
        assert "up: farspan" in user.farspan("cluster", "up", SPEC, *settings, "--yes", timeout_s=_UP_S)
        assert yaml.safe_load((user.launched / "launcher.yaml").read_text(encoding="utf-8")) == rendered
        assert kinds(there) == ["head"]
        there.client("s3").create_bucket(Bucket="farspan")
        with user.dashboard() as address:
            # Nobody comes in without the token.
            assert httpx.get(f"{address}/api/jobs/", trust_env=False).status_code == 401
            train(user, there, address)
            assert kinds(there) == ["cpu", "head"]
            watched(there)
            serve(user, there, address)
        secrets_stand_nowhere(user, there)
        assert user.farspan("cluster", "down", SPEC, *settings, "--yes", timeout_s=_DOWN_S).startswith("down: farspan")
        assert there.running() == []
        # The processes of both machines were among those that were looked at.
        assert {os.readlink(f"/proc/{machine.pid}/ns/pid") for machine in there.machines} <= watch.namespaces
    assert watch.seen == set()


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_with_certificates_of_its_network_a_cluster_speaks_tls_and_takes_a_worker_in(tmp_path: Path) -> None:
    with cloud(2) as there:
        user, head = User(tmp_path, there), there.machines[0].address
        network = f"{head.rpartition('.')[0]}.0/24"
        assert "tls_folder=" in user.farspan("infra", "certs", "tls", "--host", network, timeout_s=60)
        settings = [*there.bring(), f"tls_folder={tmp_path}/tls"]
        user.farspan("cluster", "up", SPEC, *settings, "--yes", timeout_s=_UP_S)
        there.client("s3").create_bucket(Bucket="farspan")
        with user.dashboard() as address:
            train(user, there, address)
        assert kinds(there) == ["cpu", "head"]
        for number in range(2):
            sent = there.home(number) / "farspan-tls"
            assert sorted(file.name for file in sent.iterdir()) == ["ca.crt", "node.crt", "node.key"]
            assert stat.S_IMODE((sent / "node.key").stat().st_mode) == 0o600
        assert secure_address(tmp_path / "tls", head) == head
        with pytest.raises((ssl.SSLError, ConnectionError)):
            secure_address(None, head)
        user.farspan("cluster", "down", SPEC, *settings, "--yes", timeout_s=_DOWN_S)
        assert there.running() == []


def secure_address(folder: Path | None, head: str) -> str:
    """An address for which the head's GCS shows a certificate, asked by a node of that folder, or by a stranger."""
    if folder is None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    else:
        context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        context.load_cert_chain(folder / "node.crt", folder / "node.key")
    # As gRPC speaks.
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((head, 6379), 30) as plain,
        context.wrap_socket(plain, server_hostname=head) as secure,
    ):
        # A server that wants a certificate says so only after the handshake, where it would have begun to speak.
        assert secure.recv(1) != b""
        names = [name for kind, name in secure.getpeercert()["subjectAltName"] if kind == "IP Address"]
    return next(name for name in names if name == head)


def secrets_stand_nowhere(user: User, there: Cloud) -> None:
    """In no file but those that are meant to hold them: of the user, of the machines, and in the bucket."""
    assert files_with(SECRETS, user.folder) == {".ray/auth_token", "api_key"}
    # Not as an argument, which would be a command line.
    words = there.folder / "words"
    words.write_text("\n".join(SECRETS), encoding="ascii")
    for number, machine in enumerate(there.machines):
        assert files_with(SECRETS, there.home(number)) == {".ray/auth_token"}
        places = ["/tmp", "/etc/profile.d", "/run"]
        found = machine.run("grep", "-rlaF", "--devices=skip", "-f", str(words), *places, timeout_s=_WORK_S)
        assert found.stdout == ""
        # Ray's logs were among them.
        assert machine.run("sh", "-c", "ls /tmp/ray/session_*/logs/raylet.out").returncode == 0
    s3 = there.client("s3")
    objects = [found["Key"] for found in s3.list_objects_v2(Bucket="farspan")["Contents"]]
    assert "run/events.jsonl" in objects
    for key in objects:
        body = s3.get_object(Bucket="farspan", Key=key)["Body"].read()
        assert [word for word in SECRETS if word.encode() in body] == [], key


def train(user: User, there: Cloud, address: str) -> None:
    s3, corpus = there.client("s3"), Path(small_corpus(user.folder))
    for file in sorted(corpus.rglob("*")):
        if file.is_file():
            s3.put_object(Bucket="farspan", Key=f"corpus/{file.relative_to(corpus)}", Body=file.read_bytes())
    run = {
        "model": {"architecture": "llama", "settings": {**TINY, "tie_word_embeddings": True}},
        "data": {"corpus": "s3://farspan/corpus", "sequence_tokens": 64},
        "parallel": {"workers": 2, "sp": 2},
        "train": {"steps": 2},
        "resources": {"timeout_s": _WORK_S},
        "output": "s3://farspan/run",
    }
    (user.folder / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    said = user.farspan("train", "run.yaml", "--cluster", address, timeout_s=_WORK_S)
    assert "step     2/2" in said
    assert "model published: s3://farspan/run/model" in said


def watched(there: Cloud) -> None:
    """The worker asks its metadata service for a notice of EC2; there is none here."""
    log, ends = there.home(1) / "farspan-spot.log", time.monotonic() + _WORK_S
    while not log.is_file() or "watching http://169.254.169.254" not in log.read_text(encoding="utf-8"):
        assert time.monotonic() < ends
        time.sleep(0.2)


def serve(user: User, there: Cloud, address: str) -> None:
    words = ["model=s3://farspan/run/model", "host=0.0.0.0", "port=8000", f"api_key_file={user.folder}/api_key"]
    config = str(REPOSITORY / "serve" / "configs" / "local.yaml")
    said = user.farspan("serve", config, *words, "engine.kv_bytes=16777216", "--cluster", address, timeout_s=_WORK_S)
    url = f"http://{there.machines[0].address}:8000/v1"
    assert f"ready: {url}  model model" in said
    assert KEY not in said
    assert httpx.get(f"{url}/models", trust_env=False).status_code == 401
    client = openai.OpenAI(base_url=url, api_key=KEY, timeout=60, http_client=httpx.Client(trust_env=False))
    completion = client.completions.create(model="model", prompt="def ", max_tokens=4, temperature=0)
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 4
    (job,) = [j for j in jobs(user, address) if j["name"] == "serve-model"]
    assert job["status"] == "RUNNING"
    # Not even its hash stands where everybody on the cluster can read it.
    assert KEY not in json.dumps(job)
    user.farspan("jobs", "stop", job["id"], "--cluster", address, timeout_s=_WORK_S)
    assert not answers(f"http://{there.machines[0].address}:8000/ready")


def jobs(user: User, address: str) -> list[dict[str, Any]]:
    return list(json.loads(user.farspan("jobs", "list", "--json", "--cluster", address, timeout_s=60)))
