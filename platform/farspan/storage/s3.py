"""Files of an S3 bucket, through s3fs.

Credentials, region and endpoint come from the standard AWS chain (environment, profile, role; AWS_ENDPOINT_URL for a
server that is not Amazon's). Each request is tried `ATTEMPTS` times with exponential backoff when the server answers
5xx or the connection breaks; a body that breaks off is asked for again `BODY_ATTEMPTS` times.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pyarrow as pa
import s3fs
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import ConnectionError as NotConnectedError
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

from farspan.errors import CorruptDataError, NoAnswerError, NotFoundError, StorageError, UnreachableError
from farspan.storage.local import explain_os_error
from farspan.storage.paths import check_relative
from farspan.storage.store import FileInfo, Store

ATTEMPTS = 4
BODY_ATTEMPTS = 2
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 30
# Large files travel in parts, ten at a time: this bounds the memory a transfer takes to ten parts.
PART_BYTES = 16 * 1024 * 1024

# What the network does, and not what somebody set: it may be over in a minute.
_CUT_OFF = (HTTPClientError, NotConnectedError)
_MD5 = re.compile("[0-9a-f]{32}")

_Answer = TypeVar("_Answer")


class S3Store(Store):
    """The objects below `s3://bucket/prefix`."""

    def __init__(self, uri: str, bucket: str, prefix: str) -> None:
        self.uri = uri
        self.bucket = bucket
        self.root = f"{bucket}/{prefix}" if prefix else bucket
        # s3fs's own caches would show this process an older bucket, and an older endpoint, than the real one.
        self._files = s3fs.S3FileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            default_block_size=PART_BYTES,
            config_kwargs={
                "connect_timeout": CONNECT_TIMEOUT_S,
                "read_timeout": READ_TIMEOUT_S,
                "retries": {"mode": "standard", "total_max_attempts": ATTEMPTS},
            },
        )
        self._files.retries = BODY_ATTEMPTS

    @property
    def arrow(self) -> tuple[FileSystem, str]:
        return PyFileSystem(FSSpecHandler(self._files)), self.root

    def read_bytes(self, path: str) -> bytes:
        return self._ask(f"reading {path}", lambda: self._files.cat_file(self._at(path)))

    def open_input(self, path: str) -> pa.NativeFile:
        at = self._at(path)
        self.size(path)
        files, _ = self.arrow
        return self._ask(f"opening {path}", lambda: files.open_input_file(at))

    def write_bytes(self, path: str, data: bytes) -> None:
        self._ask(f"writing {path}", lambda: self._files.pipe_file(self._at(path), data))

    def upload(self, source: Path, path: str) -> None:
        self._ask(f"writing {path}", lambda: self._files.put_file(str(source), self._at(path), chunksize=PART_BYTES))

    def download(self, path: str, target: Path) -> None:
        self._ask(f"reading {path}", lambda: self._files.get_file(self._at(path), str(target)))

    def exists(self, path: str) -> bool:
        try:
            self.size(path)
        except NotFoundError:
            return False
        return True

    def size(self, path: str) -> int:
        info = self._ask(f"looking at {path}", lambda: self._files.info(self._at(path)))
        if info["type"] != "file":
            raise NotFoundError(self.uri, f"{path} is not an object; check the path")
        return int(info["size"])

    def list(self, prefix: str = "") -> list[FileInfo]:
        top = self._at(prefix) if prefix else self.root
        found = self._ask("listing", lambda: self._files.find(top, detail=True))
        names = len(self.root) + 1
        files = [
            FileInfo(check_relative(self.uri, name[names:]), int(info["size"]), str(info.get("ETag", "")).strip('"'))
            for name, info in found.items()
            # A key that ends in a slash marks a folder; one that equals the prefix is an object beside the folder.
            if info["type"] == "file" and not name.endswith("/") and name != self.root
        ]
        return sorted(files, key=lambda info: info.path)

    def md5(self, file: FileInfo) -> str | None:
        # The ETag of what was uploaded in parts is that of its parts; of what a key encrypts, a random one.
        if not _MD5.fullmatch(file.version):
            return None
        at = {"Bucket": self.bucket, "Key": self._at(file.path).removeprefix(f"{self.bucket}/")}
        head = self._ask(f"looking at {file.path}", lambda: self._files.call_s3("head_object", **at))
        plain = head.get("ServerSideEncryption", "AES256") == "AES256" and "SSECustomerAlgorithm" not in head
        return file.version if plain else None

    def delete(self, path: str) -> None:
        # One request per object: the bulk request reports failures that s3fs does not raise.
        try:
            self._ask(f"deleting {path}", lambda: self._files.rm_file(self._at(path)))
        except NotFoundError:
            return

    def _at(self, path: str) -> str:
        return f"{self.root}/{check_relative(self.uri, path)}"

    def _ask(self, doing: str, request: Callable[[], _Answer]) -> _Answer:
        try:
            return request()
        except (OSError, BotoCoreError, ClientError, aiohttp.ClientError) as problem:
            raise self._explain(doing, problem) from problem

    def _explain(self, doing: str, problem: Exception) -> StorageError:
        """One sentence: the bucket, what failed, the way out."""
        chain = list(_causes(problem))
        for one in chain:
            if isinstance(one, NoCredentialsError | PartialCredentialsError):
                return self._unreachable(
                    doing,
                    "no AWS credentials were found",
                    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile",
                )
            if isinstance(one, ClientError):
                return self._explain_answer(doing, one)
            if isinstance(one, FlexibleChecksumError):
                return CorruptDataError(self.uri, f"{doing}: what arrived is not what was sent (checksum); try again")
        if isinstance(problem, FileNotFoundError):
            return self._explain_absence(doing)
        broken = next((one for one in chain if isinstance(one, BotoCoreError)), None)
        if isinstance(broken, _CUT_OFF) or isinstance(problem, ConnectionError | TimeoutError | aiohttp.ClientError):
            failed = f"{self._endpoint()} does not answer ({type(broken or problem).__name__}, {ATTEMPTS} attempts)"
            return self._no_answer(doing, failed, "check AWS_ENDPOINT_URL and the network")
        if broken is not None:
            return self._unreachable(doing, f"{type(broken).__name__}: {broken}", "check the AWS settings")
        if isinstance(problem, OSError) and problem.errno is not None:
            return explain_os_error(self.uri, doing, problem)
        return self._unreachable(doing, str(problem), "try again")

    def _explain_answer(self, doing: str, problem: ClientError) -> StorageError:
        code = str(problem.response.get("Error", {}).get("Code", ""))
        status = int(problem.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code == "NoSuchBucket":
            return self._no_bucket(doing)
        if status == 404:
            return self._explain_absence(doing)
        if status in (401, 403):
            way_out = "check the credentials and the bucket's policy (it must allow list, get, put and delete)"
            return self._unreachable(doing, f"access is denied ({status} {code})", way_out)
        if status >= 500:
            return self._no_answer(doing, f"the server answered {status} {code} {ATTEMPTS} times", "try again later")
        return self._unreachable(doing, f"the server answered {status} {code}", "check the address and the region")

    def _explain_absence(self, doing: str) -> StorageError:
        """A missing object and a missing bucket both answer 404 to a HEAD request: ask for the bucket itself."""
        try:
            self._files.call_s3("head_bucket", Bucket=self.bucket)
        except FileNotFoundError:
            return self._no_bucket(doing)
        except (OSError, BotoCoreError, ClientError):
            pass
        return NotFoundError(self.uri, f"{doing} failed: nothing is there in bucket {self.bucket!r}; check the path")

    def _no_bucket(self, doing: str) -> StorageError:
        failed = f"no such bucket at {self._endpoint()}"
        return self._unreachable(doing, failed, "create the bucket or correct its name")

    def _unreachable(self, doing: str, failed: str, way_out: str) -> StorageError:
        return UnreachableError(self.uri, f"bucket {self.bucket!r}, {doing}: {failed}; {way_out}")

    def _no_answer(self, doing: str, failed: str, way_out: str) -> StorageError:
        return NoAnswerError(self.uri, f"bucket {self.bucket!r}, {doing}: {failed}; {way_out}")

    def _endpoint(self) -> str:
        client: Any = self._files._s3
        return str(client.meta.endpoint_url) if client is not None else "the S3 endpoint"


def _causes(problem: BaseException | None) -> Iterator[BaseException]:
    """The problem, and what it was raised from; s3fs hides botocore's reason behind an OSError."""
    seen: set[int] = set()
    while problem is not None and id(problem) not in seen:
        seen.add(id(problem))
        yield problem
        problem = problem.__cause__ or problem.__context__
