"""EC2 and S3 (moto) whose machines answer: hosts out of namespaces, each with an SSH server at the address EC2 gives.

EC2 hands out the addresses of a subnet from .4 on. Hosts stand there from the beginning and become machines when an
instance gets their address; what their image brings is an SSH server, a user and where the cloud's API is.
"""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from tests.support.hosts import Host, hosts
from werkzeug.serving import WSGIRequestHandler, make_server

_NEEDS = ("ssh", "ssh-keygen", "sshd", "rsync", "sudo")
_FIRST = 4
_DEADLINE_S = 30.0
# The secret is a word that stands nowhere else, so that it can be looked for.
KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "canary-of-a-secret-access-key",
    "AWS_DEFAULT_REGION": "us-east-1",
}
# Ray's sockets lie deep in /tmp, which is the host's own; the rest of its image is this machine's.
_IMAGE = """
set -e
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind {etc}/passwd /etc/passwd
mount -t tmpfs tmpfs /etc/profile.d
"""
_SSHD = """
ListenAddress {address}
HostKey {etc}/host_key
AuthorizedKeysFile {etc}/key.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
MaxStartups 100
SetEnv {environment}
"""


@dataclass(frozen=True)
class Cloud:
    """Its API, and the machines that will answer."""

    endpoint: str
    session: Any
    folder: Path
    """On every machine and here: the key pair of the machines, their homes."""
    machines: list[Host]

    @property
    def environment(self) -> dict[str, str]:
        """Where the API is, and who asks."""
        return {**KEYS, "AWS_ENDPOINT_URL": self.endpoint, "AWS_EC2_METADATA_DISABLED": "true"}

    @property
    def key(self) -> Path:
        return self.folder / "key"

    def home(self, number: int) -> Path:
        """Home of the user on a machine."""
        return self.folder / f"{self.machines[number].name}-home"

    def client(self, service: str) -> Any:
        return self.session.create_client(
            service,
            endpoint_url=self.endpoint,
            region_name=KEYS["AWS_DEFAULT_REGION"],
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        )

    def running(self) -> list[dict[str, Any]]:
        """Instances that cost something."""
        answer = self.client("ec2").describe_instances()
        found = [instance for reservation in answer["Reservations"] for instance in reservation["Instances"]]
        return [i for i in found if i["State"]["Name"] in ("pending", "running", "stopping", "stopped")]

    def bring(self) -> list[str]:
        """What a user brings, made in this cloud, as settings of a spec."""
        ec2, iam = self.client("ec2"), self.client("iam")
        subnet = self.machines[0].address.rpartition(".")[0]
        vpc = ec2.create_vpc(CidrBlock=f"{subnet}.0/24")["Vpc"]["VpcId"]
        subnet_id = ec2.create_subnet(VpcId=vpc, CidrBlock=f"{subnet}.0/24", AvailabilityZone="us-east-1a")
        group = ec2.create_security_group(GroupName="farspan", Description="d", VpcId=vpc)["GroupId"]
        image = ec2.describe_images()["Images"][0]["ImageId"]
        for name in ("farspan-head", "farspan-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
        ec2.import_key_pair(KeyName="farspan", PublicKeyMaterial=self.key.with_suffix(".pub").read_bytes())
        return [
            "aws.account=123456789012", f"aws.image={image}", f"aws.subnet={subnet_id['Subnet']['SubnetId']}",
            f"aws.security_group={group}", f"aws.ssh_user={getpass.getuser()}", f"aws.ssh_private_key={self.key}",
            f"environment={sys.prefix}",
        ]  # fmt: skip


@contextmanager
def cloud(num_machines: int) -> Iterator[Cloud]:
    """A cloud with room for so many machines; skips loudly where this machine cannot hold one."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin"))
    if missing := [name for name in _NEEDS if shutil.which(name, path=path) is None]:
        pytest.skip(f"machines of a mocked EC2 need {', '.join(missing)}")
    folder = Path(tempfile.mkdtemp(prefix="farspan-cloud-", dir="/var/tmp"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        # Shared memory by name only: nobody fills it.
        made = stack.enter_context(hosts(_FIRST - 1 + num_machines, shm_mb=16384, tmp_mb=4096))[_FIRST - 1 :]
        endpoint = stack.enter_context(api(f"{made[0].address.rpartition('.')[0]}.254"))
        found = Cloud(endpoint, botocore.session.Session(), folder, made)
        for name in ("host_key", "key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
        for machine in made:
            _boot(machine, found, str(shutil.which("sshd", path=path)))
        yield found


@contextmanager
def api(address: str) -> Iterator[str]:
    """The cloud's API alone; gives its address."""
    server = make_server(
        address, 0, DomainDispatcherApplication(create_backend_app), threaded=True, request_handler=_QuietHandler
    )
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="cloud", daemon=True)
    thread.start()
    try:
        endpoint = f"http://{address}:{server.server_port}"
        # Its state is this process's: what earlier tests left there must not be found.
        with urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")) as answer:
            assert answer.status == 200
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join(_DEADLINE_S)


def _boot(machine: Host, cloud: Cloud, sshd: str) -> None:
    """Its own home for this user, the mounts of its image, and an SSH server that lets the key pair in."""
    etc, home = cloud.folder / f"{machine.name}-etc", cloud.home(cloud.machines.index(machine))
    etc.mkdir()
    home.mkdir()
    (home / ".bashrc").touch()
    for name in ("host_key", "key.pub"):
        shutil.copy(cloud.folder / name, etc / name)
    users = [line.split(":") for line in Path("/etc/passwd").read_text(encoding="utf-8").splitlines()]
    for user in users:
        if user[0] == getpass.getuser():
            user[5] = str(home)
    (etc / "passwd").write_text("\n".join(":".join(user) for user in users) + "\n", encoding="utf-8")
    environment = " ".join(f"{name}={value}" for name, value in cloud.environment.items())
    text = _SSHD.format(address=machine.address, etc=etc, environment=environment)
    (etc / "sshd_config").write_text(text, encoding="utf-8")
    answer = machine.run("sh", "-c", _IMAGE.format(etc=etc))
    assert answer.returncode == 0, answer.stderr
    log = etc / "sshd.log"
    server = machine.start(sshd, "-D", "-e", "-f", str(etc / "sshd_config"), log=log)
    ends = time.monotonic() + _DEADLINE_S
    while "Server listening" not in (said := log.read_text(encoding="utf-8", errors="replace")):
        assert server.poll() is None, said
        assert time.monotonic() < ends, said
        time.sleep(0.05)


class _QuietHandler(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None:
        pass


def _run(*words: str) -> None:
    answer = subprocess.run(words, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    assert answer.returncode == 0, answer.stderr
