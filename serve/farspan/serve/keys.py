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


def key_hashes(config: ServeConfig, folder: Path) -> tuple[tuple[str, ...], Path]:
    """(sha256 of every key, the file they stand in). Makes one key in `folder` when the config names no file.

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
        path = _make_key(folder)
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


def _make_key(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / "api_key"
    if not path.exists():
        # Created with its final mode: it is never readable by others, not even for a moment.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(f"sk-{secrets.token_urlsafe(32)}\n")
    return path


def _read_keys(path: Path) -> list[str]:
    if not path.is_file():
        raise ConfigError("api_key_file", "must be a file with one key per line", str(path), "write one key into it")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError("api_key_file", "must be mode 600", f"{mode:o}", f"run chmod 600 {path}")
    keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not keys:
        raise ConfigError("api_key_file", "must hold at least one key", str(path), "write one key into it")
    return keys
