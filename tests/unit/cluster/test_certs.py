"""Certificates made here are taken by a real TLS handshake, and by nothing weaker."""

import contextlib
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest

from farspan.cluster.certs import make_certificates, ray_variables
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


def test_keys_are_readable_by_their_owner_alone(made: Path) -> None:
    assert {stat.S_IMODE(file.stat().st_mode) for file in made.iterdir()} == {0o600}
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert {Path(value) for name, value in ray_variables(made).items() if name != "RAY_USE_TLS"} < set(made.iterdir())


def test_what_cannot_be_signed_is_one_sentence(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--host: must be given"):
        make_certificates(tmp_path / "x", [], 30)
    with pytest.raises(ConfigError, match=r"--days: must lie in 1\.\.3650"):
        make_certificates(tmp_path / "x", ["a"], 0)
    (made / "ca.key").unlink()
    with pytest.raises(StorageError, match="half an authority"):
        make_certificates(made, ["a"], 30)
    (made / "ca.key").write_text("no key")
    with pytest.raises(StorageError, match="is not PEM"):
        make_certificates(made, ["a"], 30)
