"""Certificates made here are taken by a real TLS handshake, and by nothing weaker."""

import contextlib
import datetime
import shutil
import socket
import ssl
import stat
import threading
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from farspan.cluster import certs
from farspan.cluster.certs import check_certificates, make_certificates
from farspan.cluster.environment import tls_switches
from farspan.errors import ConfigError, StorageError

_DEADLINE_S = 30.0


def context(folder: Path, purpose: ssl.Purpose, *, with_certificate: bool = True) -> ssl.SSLContext:
    made = ssl.create_default_context(purpose, cafile=str(folder / "ca.crt"))
    if with_certificate:
        made.load_cert_chain(folder / "node.crt", folder / "node.key")
    made.verify_mode = ssl.CERT_REQUIRED
    return made


def handshake(server: ssl.SSLContext, client: ssl.SSLContext | None, name: str = "127.0.0.1") -> bytes:
    """What a client reads from a server that says `hello` after the handshake; client None: without TLS."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(_DEADLINE_S)

        def answer() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.settimeout(_DEADLINE_S)
                try:
                    with server.wrap_socket(peer, server_side=True) as secure:
                        secure.sendall(b"hello")
                except OSError:
                    return

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            with socket.create_connection(listener.getsockname(), timeout=_DEADLINE_S) as plain:
                if client is None:
                    plain.sendall(b"no TLS here\r\n\r\n")
                    return plain.recv(64)
                with client.wrap_socket(plain, server_hostname=name) as secure:
                    return secure.recv(64)
        finally:
            thread.join(_DEADLINE_S)
            assert not thread.is_alive()


@pytest.fixture
def made(tmp_path: Path) -> Path:
    make_certificates(tmp_path / "tls", ["10.0.0.1", "node.example"], 30)
    return tmp_path / "tls"


def test_two_nodes_of_one_authority_trust_each_other(made: Path) -> None:
    server = context(made, ssl.Purpose.CLIENT_AUTH)
    assert handshake(server, context(made, ssl.Purpose.SERVER_AUTH)) == b"hello"
    assert handshake(server, context(made, ssl.Purpose.SERVER_AUTH), "10.0.0.1") == b"hello"
    assert handshake(server, context(made, ssl.Purpose.SERVER_AUTH), "node.example") == b"hello"


def test_a_network_stands_for_every_address_in_it_and_for_no_other(tmp_path: Path) -> None:
    make_certificates(tmp_path / "net", ["10.0.0.0/30", "fd00::/127"], 30)
    server = context(tmp_path / "net", ssl.Purpose.CLIENT_AUTH)
    for address in ("10.0.0.0", "10.0.0.3", "fd00::1", "127.0.0.1"):
        assert handshake(server, context(tmp_path / "net", ssl.Purpose.SERVER_AUTH), address) == b"hello"
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, context(tmp_path / "net", ssl.Purpose.SERVER_AUTH), "10.0.0.4")


def spoken_by_grpc(folder: Path) -> bool:
    """Whether gRPC, which Ray speaks, gets through a handshake with a node's certificate on both sides."""
    key, node, authority = ((folder / name).read_bytes() for name in ("node.key", "node.crt", "ca.crt"))
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, node)], authority, True))
    server.start()
    client = grpc.ssl_channel_credentials(authority, key, node)
    with grpc.secure_channel(f"127.0.0.1:{port}", client) as channel, pytest.raises(grpc.RpcError) as answer:
        channel.unary_unary("/no/method")(b"", timeout=_DEADLINE_S)
    server.stop(None).wait(_DEADLINE_S)
    return answer.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("hosts", [["10.1.0.0/22", "127.0.0.1", "localhost"], ["fd00::/120", "10.1.0.0/24"]])
def test_grpcs_handshake_holds_as_many_addresses_as_may_be_named(hosts: list[str], tmp_path: Path) -> None:
    make_certificates(tmp_path / "most", hosts, 30)
    server = context(tmp_path / "most", ssl.Purpose.CLIENT_AUTH)
    assert handshake(server, context(tmp_path / "most", ssl.Purpose.SERVER_AUTH), "10.1.0.255") == b"hello"
    assert spoken_by_grpc(tmp_path / "most")
    with pytest.raises(ConfigError, match=r"--host: must name at most 1024 addresses .*, got 'one\.more'"):
        make_certificates(tmp_path / "most", [*hosts, "one.more"], 30)


def test_grpcs_handshake_does_not_hold_twice_as_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certs, "_MOST_ADDRESSES", 2048)
    make_certificates(tmp_path / "more", ["10.0.0.0/21"], 30)
    assert not spoken_by_grpc(tmp_path / "more")


def test_a_stranger_is_refused(made: Path, tmp_path: Path) -> None:
    server = context(made, ssl.Purpose.CLIENT_AUTH)
    make_certificates(tmp_path / "other", ["127.0.0.1"], 30)
    with pytest.raises(ssl.SSLError):
        handshake(server, context(tmp_path / "other", ssl.Purpose.SERVER_AUTH))
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(server, context(made, ssl.Purpose.SERVER_AUTH, with_certificate=False))
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, context(made, ssl.Purpose.SERVER_AUTH), "10.0.0.2")
    with contextlib.suppress(ConnectionError):
        assert b"hello" not in handshake(server, None)


def test_a_second_call_keeps_the_authority_and_replaces_the_nodes_key(made: Path) -> None:
    authority, node = (made / "ca.crt").read_bytes(), (made / "node.key").read_bytes()
    written = make_certificates(made, ["10.0.0.9"], 30)
    assert [path.name for path in written] == ["node.crt", "node.key"]
    assert (made / "ca.crt").read_bytes() == authority
    assert (made / "node.key").read_bytes() != node
    server = context(made, ssl.Purpose.CLIENT_AUTH)
    assert handshake(server, context(made, ssl.Purpose.SERVER_AUTH), "10.0.0.9") == b"hello"


def test_a_folder_of_certificates_is_checked_before_it_is_sent(made: Path, tmp_path: Path) -> None:
    check_certificates(made, {"10.0.0.1": "10.0.0.1", "here": "127.0.0.1"})
    with pytest.raises(
        ConfigError,
        match=r"tls_folder: must hold a certificate with every node's address, got '10\.0\.0\.2 \(node\.example\)'",
    ):
        check_certificates(made, {"node.example": "10.0.0.2"})
    make_certificates(tmp_path / "strange", ["10.0.0.1"], 30)
    for file, said in (("ca.crt", "of one authority"), ("node.key", "the key of node.crt")):
        mixed = tmp_path / f"mixed-{file}"
        shutil.copytree(made, mixed)
        shutil.copy(tmp_path / "strange" / file, mixed / file)
        with pytest.raises(ConfigError, match=f"tls_folder: must hold .*{said}"):
            check_certificates(mixed, {})


def test_certificates_that_have_ended_are_refused(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certs, "_EARLIER", datetime.timedelta(days=31))
    make_certificates(made, ["10.0.0.1"], 30)
    with pytest.raises(ConfigError, match=r"must hold certificates that are good now: node.crt ended, got '20"):
        check_certificates(made, {})


def test_keys_are_readable_by_their_owner_alone(made: Path) -> None:
    assert {stat.S_IMODE(file.stat().st_mode) for file in made.iterdir()} == {0o600}
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert {Path(value) for name, value in tls_switches(str(made)).items() if name != "RAY_USE_TLS"} < set(
        made.iterdir()
    )


def test_what_cannot_be_signed_is_one_sentence(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--host: must be given"):
        make_certificates(tmp_path / "x", [], 30)
    with pytest.raises(ConfigError, match=r"--days: must lie in 1\.\.3650"):
        make_certificates(tmp_path / "x", ["a"], 0)
    for host, said in (
        ("10.0.0.4/24", "must be a network"),
        ("10.0.0.0/8", "must name at most 1024 addresses in all, a /22, a third of that of IPv6, got '10.0.0.0/8'"),
        ("node one", "must be an address, a network or a name, got 'node one'"),
    ):
        with pytest.raises(ConfigError, match=f"--host: {said}"):
            make_certificates(tmp_path / "x", [host], 30)
    assert not (tmp_path / "x").exists()
    (made / "ca.key").unlink()
    with pytest.raises(StorageError, match="half an authority"):
        make_certificates(made, ["a"], 30)
    (made / "ca.key").write_text("no key")
    with pytest.raises(StorageError, match="is not PEM"):
        make_certificates(made, ["a"], 30)
