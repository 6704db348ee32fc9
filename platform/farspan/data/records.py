"""What lies in a source file: one text, or many records (JSON lines, Parquet rows), in their order.

A record that cannot be used is still told, with the reason, so that whoever counts can count it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from farspan.config.load import nearest
from farspan.config.schema import CorpusConfig
from farspan.data.sources import SourceFile
from farspan.errors import ConfigError, CorruptDataError

NOT_UTF8 = "not UTF-8"
NOT_JSON = "not a JSON object"
NO_TEXT = "no text in text_field"
NO_CONVERSATION = "no conversation in messages_field"
EMPTY = "empty"

_CODECS = {".gz": "gzip", ".zst": "zstd"}
_RECORDS = {".jsonl": "lines", ".ndjson": "lines", ".parquet": "parquet"}
_BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class Record:
    """A text, a conversation, or the reason why there is neither. `name` is the file's, with `:line` or `:row` from 1
    where a file holds many."""

    name: str
    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    problem: str | None = None


def file_kind(path: str) -> str:
    """text (the whole file is one), lines or parquet, by the name."""
    stem = path.lower()
    for suffix in _CODECS:
        stem = stem.removesuffix(suffix)
    return next((kind for suffix, kind in _RECORDS.items() if stem.endswith(suffix)), "text")


def read_records(file: SourceFile, config: CorpusConfig) -> Iterator[Record]:
    """Every record of a file, in order. An empty line is no record.

    Raises:
        ConfigError: a field that no record can have, or conversations asked of a plain text.
        CorruptDataError: a file that ends or breaks in the middle: what is lost cannot be counted.
    """
    kind = file_kind(file.path)
    if kind == "text":
        if config.format == "chat":
            raise ConfigError("sources", "of format=chat must be .jsonl or .parquet", file.name, "set pattern=*.jsonl")
        yield _whole(file)
        return
    rows = _lines(file) if kind == "lines" else _parquet_rows(file, _field(config))
    for number, row in rows:
        yield _record(f"{file.name}:{number}", row, config)


def _field(config: CorpusConfig) -> str:
    return config.messages_field if config.format == "chat" else config.text_field


def _whole(file: SourceFile) -> Record:
    data = b"".join(_unpacked(file)) if _codec(file) else file.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return Record(file.name, problem=NOT_UTF8)
    return Record(file.name, text) if text else Record(file.name, problem=EMPTY)


def _record(name: str, row: Any, config: CorpusConfig) -> Record:
    if isinstance(row, str):
        return Record(name, problem=row)
    value = row.get(_field(config))
    if config.format == "chat":
        if not _is_conversation(value):
            return Record(name, problem=NO_CONVERSATION)
        return Record(name, messages=tuple(value))
    if not isinstance(value, str):
        return Record(name, problem=NO_TEXT)
    if not _is_unicode(value):
        return Record(name, problem=NOT_UTF8)
    return Record(name, value) if value else Record(name, problem=EMPTY)


def _is_conversation(value: Any) -> bool:
    """A non-empty list of messages that each say who speaks and what."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            and _is_unicode(message["content"])
            for message in value
        )
    )


def _is_unicode(text: str) -> bool:
    """JSON can spell half of a surrogate pair, which is no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _lines(file: SourceFile) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number, object or the reason why it is none)."""
    number = 0
    for number, line in enumerate(_unpacked(file), start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            yield number, NOT_UTF8
        except (ValueError, RecursionError):
            yield number, NOT_JSON
        else:
            yield number, content if isinstance(content, dict) else NOT_JSON


def _unpacked(file: SourceFile) -> Iterator[bytes]:
    """Lines of a file as bytes, unpacked where its name says that it is packed."""
    if file.size == 0:
        return
    codec = _codec(file)
    with file.store.open_input(file.path) as raw:
        stream = pa.CompressedInputStream(raw, codec) if codec else raw
        try:
            yield from io.BufferedReader(stream, 1 << 20)
        except (OSError, pa.ArrowException) as problem:
            reason = f"cannot be unpacked to its end ({problem}); write the file again"
            raise CorruptDataError(file.name, reason) from None


def _codec(file: SourceFile) -> str | None:
    return next((codec for suffix, codec in _CODECS.items() if file.path.lower().endswith(suffix)), None)


def _parquet_rows(file: SourceFile, field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with file.store.open_input(file.path) as raw:
            table = pq.ParquetFile(raw)
            columns = list(table.schema_arrow.names)
            if field not in columns:
                raise ConfigError("text_field", f"must be a column of {file.name}", field, nearest(field, columns))
            number = 0
            for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=[field]):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as problem:
        raise CorruptDataError(file.name, f"is not a whole Parquet file ({problem}); write it again") from None
