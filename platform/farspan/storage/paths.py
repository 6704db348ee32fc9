"""What a user may write as a place, and what a path inside a folder may look like."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from farspan.errors import ConfigError, CorruptDataError

_LEGAL = "write a local path, file:///absolute/path, or s3://bucket/prefix"


@dataclass(frozen=True, slots=True)
class LocalPlace:
    """A folder of this machine."""

    folder: Path


@dataclass(frozen=True, slots=True)
class S3Place:
    """A prefix of a bucket. `prefix` has no slash at either end; empty: the whole bucket."""

    bucket: str
    prefix: str


def parse_uri(uri: str) -> LocalPlace | S3Place:
    """A local path, `file://` or `s3://` address, split.

    Raises:
        ConfigError: another scheme, no bucket, or nothing at all.
    """
    if not uri:
        raise ConfigError("uri", "must name a folder", uri, _LEGAL)
    scheme, separator, _ = uri.partition("://")
    if not separator:
        if uri.startswith(("s3:", "file:")):
            raise ConfigError("uri", "a scheme is followed by ://", uri, _LEGAL)
        return LocalPlace(Path(os.path.abspath(os.path.expanduser(uri))))
    if scheme == "s3":
        return _parse_s3(uri)
    if scheme == "file":
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise ConfigError("uri", "file:// names a folder of this machine", uri, _LEGAL)
        return LocalPlace(Path(os.path.abspath(unquote(parts.path))))
    raise ConfigError("uri", "must be local or s3://", uri, _LEGAL)


def _parse_s3(uri: str) -> S3Place:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise ConfigError("uri", "s3:// needs a bucket", uri, _LEGAL)
    prefix = prefix.strip("/")
    if any(part in ("", ".", "..") for part in prefix.split("/")) and prefix:
        raise ConfigError("uri", "an s3 prefix has no empty part, '.' or '..'", uri, _LEGAL)
    return S3Place(bucket, prefix)


def absolute_uri(uri: str) -> str:
    """The same place for a process that stands in another folder."""
    place = parse_uri(uri)
    return str(place.folder) if isinstance(place, LocalPlace) else uri


def join_uri(uri: str, *parts: str) -> str:
    """`uri` with `parts` below it, for local and s3:// alike."""
    return "/".join([uri.rstrip("/") or "/", *parts])


def check_relative(uri: str, path: str) -> str:
    """`path` when it stays inside the folder `uri`.

    Paths come from manifests and listings, which others may have written.

    Raises:
        CorruptDataError: absolute, climbing (`..`), empty, or not in plain form.
    """
    parts = path.split("/")
    if not path or any(part in ("", ".", "..") for part in parts) or "\\" in path or "\0" in path:
        raise CorruptDataError(
            uri, f"the path {path!r} leads out of the folder or is not plain; publish the folder again"
        )
    return path
