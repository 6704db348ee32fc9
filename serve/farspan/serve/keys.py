"""API keys: read or made on the machine that deploys; replicas only ever hold their hashes.

A line of the file is a key, and after it what it may use: `sk-... requests_per_minute=60 concurrent=4`. In place of a
key its hash may stand, `sha256:...`: such a file lets in who has the key, and tells nobody what it is.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from farspan.config.load import nearest
from farspan.config.schema import ServeConfig
from farspan.config.serve_rules import is_loopback
from farspan.errors import ConfigError

_HASHED = re.compile(r"sha256:([0-9a-f]{64})")
_NUMBER = re.compile(r"-?[0-9]{1,12}")
_WAY_OUT = "write a key into a file of mode 600 and name it with api_key_file=..."


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one key may use; none: as much as there is."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Of prompts and answers."""
    concurrent: int | None = None
    """Answers at the same time: a request counts as many as it has prompts times n."""
    priority: int = 0
    """The most urgent `priority` its requests may ask for: lower is answered first."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key as replicas know it."""

    digest: str
    allowance: Allowance = Allowance()

    def derived(self, purpose: str) -> str:
        """A name for one purpose from which nobody finds the key, nor its name for another."""
        return hmac.new(bytes.fromhex(self.digest), purpose.encode(), hashlib.sha256).hexdigest()


def read_keys(config: ServeConfig, folder: Path | None = None) -> tuple[tuple[ApiKey, ...], Path]:
    """(every key, the file they stand in).

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
    return keys_of(_read(path), str(path)), path


def keys_of(text: str, file: str) -> tuple[ApiKey, ...]:
    """The keys in the text of a file. Raises ConfigError."""
    keys = tuple(parse_key(line, number) for number, line in enumerate(text.splitlines(), start=1) if line.strip())
    if not keys:
        raise ConfigError("api_key_file", "must hold at least one key", file, "write one key into it")
    if len({key.digest for key in keys}) < len(keys):
        raise ConfigError("api_key_file", "must hold each key once", file, "leave out the lines that repeat one")
    return keys


def find_key(header: str | None, keys: Sequence[ApiKey]) -> ApiKey | None:
    """The key an Authorization header carries. Takes the same time for every wrong one."""
    scheme, _, given = (header or "").partition(" ")
    if scheme.lower() != "bearer":
        return None
    # Headers are bytes: what is no text is no key.
    digest = _hash(given.strip())
    matches = [key for key in keys if hmac.compare_digest(digest, key.digest)]
    return matches[0] if matches else None


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def parse_key(line: str, number: int) -> ApiKey:
    """One line. Says which line and field is wrong, never what the key is."""
    key, *words = line.split()
    known = [field.name for field in fields(Allowance)]
    given: dict[str, int] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in known:
            rule = f"must hold {', '.join(known)} after the key of line {number}"
            # The word itself may be half of a key.
            raise ConfigError("api_key_file", rule, f"a word of {len(word)} letters", nearest(name, known))
        if not _NUMBER.fullmatch(value) or (name != "priority" and int(value) < 1):
            rule = f"must give {name} in line {number} as a whole number of at least 1"
            raise ConfigError(
                "api_key_file", rule, "something else", f"use {name}=1 or more, or leave it out for no limit"
            )
        given[name] = int(value)
    hashed = _HASHED.fullmatch(key)
    return ApiKey(_hash(key) if hashed is None else hashed[1], Allowance(**given))


def hashed_lines(keys: Sequence[ApiKey]) -> str:
    """The text of a key file that holds hashes in place of keys, and means the same."""
    lines = []
    for key in keys:
        given = {name: value for name, value in asdict(key.allowance).items() if value is not None}
        lines.append(" ".join([f"sha256:{key.digest}", *(f"{name}={value}" for name, value in given.items())]))
    return "\n".join(lines) + "\n"


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


def _read(path: Path) -> str:
    """The text of a key file that nobody else can read."""
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
    return text
