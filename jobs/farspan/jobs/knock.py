"""Knock at a cluster's door before Ray does: Ray tries for minutes and then says less.

Three questions, each of which can be the one that fails: does anybody listen, does he speak TLS as we do and vouch by
our authority, does he take our token. The last is asked by the call that Ray's own nodes ask for their health.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc

# A busy head takes its time to answer, not to be connected to.
_PATIENCE_S, _ANSWER_S = 5.0, 20.0
_CALL = "/ray.rpc.NodeInfoGcsService/CheckAlive"
# What Ray's head asks its nodes to see whether they live.
_HEALTH = "/grpc.health.v1.Health/Check"
_NOBODY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_CERTIFICATE, _KEY, _AUTHORITY = "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"
_TLS_ON = f"export RAY_USE_TLS=1, {_CERTIFICATE}, {_KEY} and {_AUTHORITY} (farspan infra certs makes them)"
_TOKEN = "give this machine the cluster's token (`ray get-auth-token` prints it there) as ~/.ray/auth_token, mode 600"


@dataclass(frozen=True, slots=True)
class Closed:
    """Why a door stays closed, and what opens it."""

    problem: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.problem}; {self.way_out}"


def knock(host: str, port: int) -> Closed | None:
    """Why the cluster whose head listens there would not let this process in; None: it does."""
    try:
        with socket.create_connection((host, port), timeout=_PATIENCE_S):
            pass
    except OSError as problem:
        return Closed(str(problem.strerror or problem), "check address, firewall and security group; is the head up?")
    secure = _wants_tls()
    theirs = _speaks_tls(host, port)
    if theirs and not secure:
        return Closed("the cluster speaks TLS and this process does not", _TLS_ON)
    if secure and not theirs:
        return Closed("this process speaks TLS and the cluster does not", "unset RAY_USE_TLS, or check the address")
    distrust = _distrust(host, port) if secure else None
    return distrust or _refusal(host, port, secure)


def _speaks_tls(host: str, port: int) -> bool:
    # Only what is spoken is asked here; whom to trust comes next.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection((host, port), timeout=_PATIENCE_S) as plain, context.wrap_socket(plain):
            return True
    except OSError:
        return False


def _distrust(host: str, port: int) -> Closed | None:
    """Why this process and the cluster do not trust each other's certificates."""
    missing = [name for name in (_CERTIFICATE, _KEY, _AUTHORITY) if not Path(os.environ.get(name, "")).is_file()]
    if missing:
        return Closed(f"RAY_USE_TLS is set and {missing[0]} names no file", _TLS_ON)
    certificate, key, authority = (os.environ[name] for name in (_CERTIFICATE, _KEY, _AUTHORITY))
    try:
        context = ssl.create_default_context(cafile=authority)
        context.load_cert_chain(certificate, key)
    except (ssl.SSLError, OSError) as problem:
        return Closed(f"{authority}, {certificate}, {key} are no certificates ({_reason(problem)})", _TLS_ON)
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), timeout=_PATIENCE_S) as plain,
            context.wrap_socket(plain, server_hostname=host) as wrapped,
        ):
            # What the other side thinks of our certificate comes after the handshake: settings, an alarm, or the end.
            if wrapped.recv(1):
                return None
            reason = "it ends the connection"
    except ssl.SSLCertVerificationError as problem:
        way_out = f"{_AUTHORITY} must name the ca.crt that the cluster's certificates were made with"
        return Closed(f"{authority} does not vouch for the cluster ({_reason(problem)})", way_out)
    except OSError as problem:
        reason = _reason(problem)
    return Closed(
        f"the cluster refuses {certificate} ({reason})", f"{_CERTIFICATE} must name one that its own authority made"
    )


def silent(doors: Sequence[tuple[str, int]], timeout_s: float) -> list[tuple[str, int]]:
    """Which of these (host, port) do not answer a gRPC call within `timeout_s`, all asked at once.

    Whatever they answer will do, a refusal too: only what lives answers.
    """
    with ExitStack() as stack:
        channels = [stack.enter_context(open_channel(host, port)) for host, port in doors]
        calls = [channel.unary_unary(_HEALTH).future(b"", timeout=timeout_s) for channel in channels]
        return [door for door, call in zip(doors, calls, strict=True) if call.code() in _NOBODY]


def open_channel(host: str, port: int) -> grpc.Channel:
    """To a node of the cluster of this process, as that wants to be spoken to."""
    return _channel(host, port, _wants_tls())


def authorized() -> list[tuple[str, str]]:
    """What a call says to be let in."""
    token = _token()
    return [("authorization", f"Bearer {token}")] if token else []


def _wants_tls() -> bool:
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _channel(host: str, port: int, secure: bool) -> grpc.Channel:
    target = f"[{host}]:{port}" if _is_ipv6(host) else f"{host}:{port}"
    # Straight there: a proxy of the environment is not meant for nodes.
    options = [("grpc.enable_http_proxy", 0)]
    return grpc.secure_channel(target, _credentials(), options) if secure else grpc.insecure_channel(target, options)


def _refusal(host: str, port: int, secure: bool) -> Closed | None:
    metadata = authorized()
    with _channel(host, port, secure) as channel:
        try:
            channel.unary_unary(_CALL)(b"", timeout=_ANSWER_S, metadata=metadata)
        except grpc.RpcError as problem:
            if problem.code() == grpc.StatusCode.UNAUTHENTICATED:
                what = (
                    "does not know the token of this process" if metadata else "wants a token and this process has none"
                )
                return Closed(f"the cluster {what}", _TOKEN)
            what = f"what answers is no head of Ray's ({problem.code().name.lower()})"
            return Closed(what, "give the address of its GCS, HOST:6379")
    return None


def _credentials() -> grpc.ChannelCredentials:
    authority, key, certificate = (Path(os.environ[name]).read_bytes() for name in (_AUTHORITY, _KEY, _CERTIFICATE))
    return grpc.ssl_channel_credentials(authority, key, certificate)


def _token() -> str:
    """As Ray finds it."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return ""
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given.strip()
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    with suppress(OSError, UnicodeDecodeError):
        return file.read_text(encoding="ascii").strip()
    return ""


def _is_ipv6(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).version == 6
    return False


def _reason(problem: OSError) -> str:
    return getattr(problem, "verify_message", None) or getattr(problem, "reason", None) or problem.strerror or "?"
