"""The door: from a URI to the folder it names."""

from __future__ import annotations

from farspan.storage.local import LocalStore
from farspan.storage.paths import LocalPlace, parse_uri
from farspan.storage.store import Store


def open_store(uri: str) -> Store:
    """The folder at `uri`. Nothing is read yet, and the folder need not exist.

    Raises:
        ConfigError: neither a local path, nor file://, nor s3://.
    """
    place = parse_uri(uri)
    if isinstance(place, LocalPlace):
        return LocalStore(uri, place.folder)
    # Importing the S3 client costs half a second that local runs need not pay.
    from farspan.storage.s3 import S3Store

    return S3Store(uri, place.bucket, place.prefix)
