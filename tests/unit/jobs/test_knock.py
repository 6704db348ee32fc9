"""Who knocks at a door is told why it stays closed; the door is gRPC's own server."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from farspan.cluster.certs import make_certificates
from farspan.cluster.environment import tls_switches
from farspan.errors import ClusterError
from farspan.jobs.knock import knock, silent
from farspan.jobs.launch import joined_ray

TOKEN = "a" * 64


class Head(grpc.GenericRpcHandler):
    """Answers the health call of whoever shows the token, as Ray's head does."""

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if call.method != "/ray.rpc.NodeInfoGcsService/CheckAlive":
            return None

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            if ("authorization", f"Bearer {TOKEN}") not in context.invocation_metadata():
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@contextmanager
def head(tls: Path | None) -> Iterator[int]:
    """Its port."""
    server = grpc.server(ThreadPoolExecutor(2), handlers=[Head()])
    if tls is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        key, certificate, authority = ((tls / name).read_bytes() for name in ("node.key", "node.crt", "ca.crt"))
        trust = grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)
        port = server.add_secure_port("127.0.0.1:0", trust)
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait(10)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two authorities, each with a certificate for this machine."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("ours", "other")}
    for folder in made.values():
        make_certificates(folder, ["127.0.0.1"], 1)
    return made


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment without anything of Ray's."""
    for name in ("RAY_USE_TLS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


@pytest.mark.parametrize(
    ("theirs", "ours", "token", "said"),
    [
        ("ours", "ours", TOKEN, None),
        (None, None, TOKEN, None),
        ("ours", "ours", "b" * 64, "does not know the token"),
        ("ours", "ours", None, "wants a token and this process has none"),
        (None, None, "b" * 64, "does not know the token"),
        ("ours", None, TOKEN, "the cluster speaks TLS and this process does not"),
        (None, "ours", TOKEN, "this process speaks TLS and the cluster does not"),
        ("ours", "other", TOKEN, "does not vouch for the cluster"),
        ("ours", "their CA, other certificate", TOKEN, "the cluster refuses"),
    ],
)
def test_only_the_right_token_over_the_right_wire_gets_in(
    folders: dict[str, Path], told: pytest.MonkeyPatch, theirs: str | None, ours: str | None, token: str | None,
    said: str | None,
) -> None:  # fmt: skip
    if token is not None:
        told.setenv("RAY_AUTH_TOKEN", token)
    if ours is not None:
        variables = tls_switches(str(folders.get(ours, folders["other"])))
        if ours not in folders:
            variables["RAY_TLS_CA_CERT"] = str(folders["ours"] / "ca.crt")
        for name, value in variables.items():
            told.setenv(name, value)
    with head(None if theirs is None else folders[theirs]) as port:
        closed = knock("127.0.0.1", port)
    if said is None:
        assert closed is None
        return
    assert closed is not None
    assert said in closed.problem
    assert closed.way_out
    assert "aaaa" not in str(closed)


@pytest.mark.usefixtures("told")
def test_where_nobody_listens_or_somebody_else_does_that_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    closed = knock("127.0.0.1", port)
    assert closed is not None
    assert closed.problem == "Connection refused"


def test_whoever_joins_a_closed_cluster_gets_one_sentence(told: pytest.MonkeyPatch) -> None:
    with head(None) as port:
        told.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        with pytest.raises(ClusterError, match="cannot be joined: the cluster wants a token"), joined_ray():
            raise AssertionError("it was let in")


def test_only_what_lives_answers(folders: dict[str, Path], told: pytest.MonkeyPatch) -> None:
    with socket.socket() as frozen, socket.socket() as gone, head(None) as port:
        # A frozen process: its machine takes the connection, and nobody speaks.
        frozen.bind(("127.0.0.1", 0))
        frozen.listen()
        gone.bind(("127.0.0.1", 0))
        doors = [("127.0.0.1", number) for number in (frozen.getsockname()[1], port, gone.getsockname()[1])]
        # This server knows no health call: that it says so is an answer.
        assert silent(doors, 2.0) == [doors[0], doors[2]]
    for name, value in tls_switches(str(folders["ours"])).items():
        told.setenv(name, value)
    with head(folders["ours"]) as port:
        assert silent([("127.0.0.1", port)], 20.0) == []
