"""Tokenized documents in Arrow IPC files that are read memory-mapped.

A shard has one row per document: `source` (utf8) and `tokens` (large_list<uint32>; the last one of a text is eos). A
shard of conversations also has `spans` (large_list<uint32>): start, stop, start, stop, ... of the tokens to train.
`documents.arrow` is the index of all shards: where each document is and how long, so that a plan of the whole corpus
is made without touching a shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from farspan.data.manifest import ShardInfo
from farspan.storage.manifest import describe_file

SCHEMA = pa.schema([("source", pa.string()), ("tokens", pa.large_list(pa.uint32()))])
CHAT_SCHEMA = SCHEMA.append(pa.field("spans", pa.large_list(pa.uint32())))
INDEX_FILE = "documents.arrow"
INDEX_SCHEMA = pa.schema([("shard", pa.uint32()), ("row", pa.uint32()), ("tokens", pa.uint64())])


class ShardWriter:
    """Collects documents, writes a shard whenever `shard_tokens` are reached, and the index at the end."""

    def __init__(self, folder: Path, shard_tokens: int, *, chat: bool = False, kept: Sequence[ShardInfo] = ()) -> None:
        """`kept` are the shards that an earlier writer of the same corpus left in `folder`."""
        self.shards: list[ShardInfo] = []
        self._folder = folder
        self._shard_tokens = shard_tokens
        self._chat = chat
        self._sources: list[str] = []
        self._tokens: list[np.ndarray] = []
        self._spans: list[np.ndarray] = []
        self._num_tokens = 0
        self._index: list[np.ndarray] = []
        for shard in kept:
            with pa.memory_map(str(folder / shard.file)) as source:
                self._count(shard, Shard(source, chat=chat).lengths)

    @property
    def full(self) -> bool:
        """Whether the documents added since the last shard are enough for the next one."""
        return self._num_tokens >= self._shard_tokens

    def add(self, source: str, tokens: np.ndarray, spans_N2: np.ndarray | None = None) -> None:
        """Add one document; `close_shard` writes what was added."""
        self._sources.append(source)
        self._tokens.append(tokens)
        if self._chat:
            assert spans_N2 is not None, "a conversation has spans"
            self._spans.append(spans_N2.reshape(-1))
        self._num_tokens += len(tokens)

    def finish(self) -> None:
        """Write the last shard and the index."""
        if self._sources:
            self.close_shard()
        shard, row, tokens = np.concatenate([np.empty((3, 0), np.int64), *self._index], axis=1)
        columns = [pa.array(shard, pa.uint32()), pa.array(row, pa.uint32()), pa.array(tokens, pa.uint64())]
        _write(self._folder / INDEX_FILE, pa.record_batch(columns, schema=INDEX_SCHEMA))

    def close_shard(self) -> ShardInfo:
        """Write the documents added since the last shard."""
        name = f"shards/{len(self.shards):05d}.arrow"
        file = self._folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        lengths = np.array([len(tokens) for tokens in self._tokens])
        columns = [pa.array(self._sources, pa.string()), _lists(self._tokens)]
        if self._chat:
            columns.append(_lists(self._spans))
        _write(file, pa.record_batch(columns, schema=CHAT_SCHEMA if self._chat else SCHEMA))
        entry = describe_file(file, name)
        shard = ShardInfo(
            file=name, documents=len(lengths), tokens=self._num_tokens, size=entry.size, sha256=entry.sha256
        )
        self._count(shard, lengths)
        self._sources, self._tokens, self._spans, self._num_tokens = [], [], [], 0
        return shard

    def _count(self, shard: ShardInfo, lengths: np.ndarray) -> None:
        self._index.append(np.stack([np.full(len(lengths), len(self.shards)), np.arange(len(lengths)), lengths]))
        self.shards.append(shard)


class Shard:
    """One open shard: the tokens of each of its documents, as views of the mapped file."""

    def __init__(self, source: pa.NativeFile, *, chat: bool = False) -> None:
        """Raises ValueError when `source` is not a shard."""
        batch = read_batch(source, CHAT_SCHEMA if chat else SCHEMA)
        tokens = batch.column("tokens")
        # The views keep the mapping alive; nothing is copied.
        self._offsets = tokens.offsets.to_numpy()
        self._values = tokens.values.to_numpy(zero_copy_only=True)
        self._spans = batch.column("spans") if chat else None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        return np.diff(self._offsets)

    def tokens(self, row: int, start: int, stop: int) -> np.ndarray:
        """uint32 view of tokens start..stop of document `row`."""
        first = int(self._offsets[row])
        return self._values[first + start : first + stop]

    def spans(self, row: int) -> np.ndarray | None:
        """spans_N2 of the tokens of document `row` that are trained; none: all of them."""
        if self._spans is None:
            return None
        return self._spans[row].values.to_numpy(zero_copy_only=True).reshape(-1, 2)


def read_batch(source: pa.NativeFile, schema: pa.Schema) -> Any:
    """The one record batch of an Arrow file with these columns.

    Raises:
        ValueError: anything else.
    """
    reader = pa.ipc.open_file(source)
    if reader.schema != schema or reader.num_record_batches != 1:
        raise ValueError(f"not an Arrow file of one batch with columns {', '.join(schema.names)}")
    return reader.get_batch(0)


def _lists(rows: Sequence[np.ndarray]) -> pa.LargeListArray:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows), pa.uint32()))


def _write(file: Path, batch: pa.RecordBatch) -> None:
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
