"""A real S3 server (moto, over HTTP on the loopback) whose network can be made to fail.

`s3_server` is the server of the whole session; `s3` is a fresh bucket on it, with the AWS environment of the test
pointing there. Processes started by the test inherit that environment and reach the same server.
"""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import botocore.session
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

REGION = "us-east-1"
ACCESS_KEY = "test-access-key"
SECRET_KEY = "test-secret-key"
_DEADLINE_S = 30.0


@dataclass
class Faults:
    """What goes wrong before a request reaches the server, for the next so many requests whose path contains `path`."""

    path: str = ""
    unavailable: int = 0
    """Answer 503."""
    broken_bodies: int = 0
    """Send half of the body of an answer to GET, then close the connection."""
    altered_bodies: int = 0
    """Send another last byte in an answer to GET."""
    outage_s: float = 0.0
    """From the first request on, for so long, nothing is answered: 503 and dropped connections in turns."""
    outage_requests: int = 0
    """So many requests are not answered, however long they take to come."""
    outage_ends_s: float | None = None
    """A monotonic clock; None before the first request."""
    refused: int = 0
    dropped: int = 0
    seen: int = 0
    """Requests whose path contained `path`, since `plan`."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def plan(self, path: str = "", *, unavailable: int = 0, broken_bodies: int = 0, altered_bodies: int = 0) -> None:
        with self._lock:
            self.path, self.seen = path, 0
            self.unavailable, self.broken_bodies, self.altered_bodies = unavailable, broken_bodies, altered_bodies
            self.outage_s, self.outage_requests, self.outage_ends_s = 0.0, 0, None
            self.refused, self.dropped = 0, 0

    def outage(self, seconds: float, requests: int = 0) -> None:
        """From the next request on, for so long and so many of them, nothing is answered, whatever its path.

        A client that comes late finds the outage all the same.
        """
        self.plan()
        self.outage_s, self.outage_requests = seconds, requests

    def take(self, path: str, method: str) -> str | None:
        with self._lock:
            if self.path not in path:
                return None
            self.seen += 1
            if self._out():
                return self._fail()
            if self.unavailable > 0:
                self.unavailable -= 1
                return "unavailable"
            if self.broken_bodies > 0 and method == "GET":
                self.broken_bodies -= 1
                return "broken body"
            if self.altered_bodies > 0 and method == "GET":
                self.altered_bodies -= 1
                return "altered body"
            return None

    def _out(self) -> bool:
        if self.outage_ends_s is None:
            self.outage_ends_s = time.monotonic() + self.outage_s
        return time.monotonic() < self.outage_ends_s or self.refused + self.dropped < self.outage_requests

    def _fail(self) -> str:
        if self.refused <= self.dropped:
            self.refused += 1
            return "unavailable"
        self.dropped += 1
        return "dropped"


class FaultyServer:
    """WSGI application: moto behind a network that fails as planned."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.moto = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        fault = self.faults.take(environ["PATH_INFO"], environ["REQUEST_METHOD"])
        if fault == "unavailable":
            return _refuse(environ, start_response)
        if fault == "dropped":
            # Or the client would wait for an answer on a connection that is still open.
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError("planned")
        answer = self.moto(environ, start_response)
        if fault == "broken body":
            whole = b"".join(answer)
            # The announced length is that of the whole: the client sees a connection that broke off.
            return [whole[: len(whole) // 2]]
        if fault == "altered body":
            whole = b"".join(answer)
            return [whole[:-1], bytes([whole[-1] ^ 1])]
        return answer


def _refuse(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    # An unread request, or a body after HEAD, would look like a broken connection instead of a clear 503.
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    body = b"<Error><Code>ServiceUnavailable</Code><Message>planned</Message></Error>"
    body = b"" if environ["REQUEST_METHOD"] == "HEAD" else body
    start_response("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


@dataclass(frozen=True)
class S3Server:
    """Where it listens, how its network fails, and a plain client that looks at it from outside."""

    endpoint: str
    faults: Faults
    client: Any


@dataclass(frozen=True)
class S3Bucket:
    """A fresh, empty bucket."""

    name: str
    server: S3Server

    @property
    def uri(self) -> str:
        return f"s3://{self.name}"

    def keys(self) -> list[str]:
        answer = self.server.client.list_objects_v2(Bucket=self.name)
        return sorted(entry["Key"] for entry in answer.get("Contents", []))

    def put(self, key: str, data: bytes) -> None:
        self.server.client.put_object(Bucket=self.name, Key=key, Body=data)

    def get(self, key: str) -> bytes:
        return bytes(self.server.client.get_object(Bucket=self.name, Key=key)["Body"].read())

    def deny(self, *actions: str) -> None:
        """Attach a bucket policy that denies these actions (s3:GetObject, s3:ListBucket, ...) to everybody."""
        resources = [f"arn:aws:s3:::{self.name}", f"arn:aws:s3:::{self.name}/*"]
        statement = {"Effect": "Deny", "Principal": "*", "Action": list(actions), "Resource": resources}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        self.server.client.put_bucket_policy(Bucket=self.name, Policy=policy)


def _client(endpoint: str) -> Any:
    return botocore.session.Session().create_client(
        "s3",
        endpoint_url=endpoint,
        region_name=REGION,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
    )


class _QuietHandler(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    faults = Faults()
    server = make_server("127.0.0.1", 0, FaultyServer(faults), threaded=True, request_handler=_QuietHandler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="s3-server", daemon=True)
    thread.start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        yield S3Server(endpoint, faults, _client(endpoint))
    finally:
        server.shutdown()
        server.server_close()
        thread.join(_DEADLINE_S)
        assert not thread.is_alive()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Bucket]:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    bucket = S3Bucket(f"bucket-{uuid.uuid4().hex}", s3_server)
    s3_server.client.create_bucket(Bucket=bucket.name)
    try:
        yield bucket
    finally:
        s3_server.faults.plan()
