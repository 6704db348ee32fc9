"""API keys: read or made on the machine that deploys; replicas only ever hold their hashes."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path

from farspan.config.schema import ServeConfig
from farspan.errors import ConfigError

_WAY_OUT = "write a key into a file of mode 600 and name it with api_key_file=..."


def key_hashes(config: ServeConfig, folder: Path | None = None) -> tuple[tuple[str, ...], Path]:
    """(sha256 of every key, the file they stand in).

    Makes one key when the config names no file: in `folder`, or else in the cache of the user's home.

    Raises ConfigError when a key file cannot be used, or when a server beyond this machine has none.
    """
    if config.api_key_file is None:
        if not is_loopback(config.host):
            raise ConfigError(
                "api_key_file",
                f"must be given when host is {config.host}, which other machines can reach",
                None,
                "write a key into a file of mode 600 and name it, or use host=127.0.0.1",
            )
        path = _make_key(folder or _home_folder())
    else:
        path = Path(config.api_key_file)
    keys = _read_keys(path)
    return tuple(_hash(key) for key in keys), path


def is_allowed(header: str | None, hashes: Sequence[str]) -> bool:
    """Whether an Authorization header carries one of the keys. Takes the same time for every wrong key."""
    scheme, _, key = (header or "").partition(" ")
    if scheme.lower() != "bearer":
        return False
    given = _hash(key.strip())
    matches = [hmac.compare_digest(given, known) for known in hashes]
    return any(matches)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _home_folder() -> Path:
    try:
        return Path.home() / ".cache" / "farspan" / "serve"
    except RuntimeError:
        raise ConfigError("api_key_file", "must be given for a user without a home folder", None, _WAY_OUT) from None


def _make_key(folder: Path) -> Path:
    path = folder / "api_key"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            # Created with its final mode: it is never readable by others, not even for a moment.
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(f"sk-{secrets.token_urlsafe(32)}\n")
    except OSError as problem:
        rule = f"must be given when no key can be written to {path} ({problem.strerror})"
        raise ConfigError("api_key_file", rule, None, _WAY_OUT) from None
    return path


def _read_keys(path: Path) -> list[str]:
    try:
        is_file, mode, text = path.is_file(), 0, ""
        if is_file:
            mode = stat.S_IMODE(path.stat().st_mode)
            text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else "not text"
        raise ConfigError("api_key_file", f"must be readable ({reason})", str(path), _WAY_OUT) from None
    if not is_file:
        raise ConfigError("api_key_file", "must be a file with one key per line", str(path), "write one key into it")
    if mode & 0o077:
        raise ConfigError("api_key_file", "must be mode 600", f"{mode:o}", f"run chmod 600 {path}")
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    if not keys:
        raise ConfigError("api_key_file", "must hold at least one key", str(path), "write one key into it")
    return keys
