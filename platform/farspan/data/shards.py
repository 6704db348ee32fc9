"""Tokenized documents in Arrow IPC files that are read memory-mapped.

A shard has one row per document: `source` (utf8) and `tokens` (large_list<uint32>, the last one being eos).
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
INDEX_FILE = "documents.arrow"
INDEX_SCHEMA = pa.schema([("shard", pa.uint32()), ("row", pa.uint32()), ("tokens", pa.uint64())])


class ShardWriter:
    """Collects documents, writes a shard whenever `shard_tokens` are reached, and the index at the end."""

    def __init__(self, folder: Path, shard_tokens: int) -> None:
        self.shards: list[ShardInfo] = []
        self._folder = folder
        self._shard_tokens = shard_tokens
        self._sources: list[str] = []
        self._tokens: list[np.ndarray] = []
        self._num_tokens = 0
        self._index: list[np.ndarray] = []

    def add(self, source: str, tokens: Sequence[int]) -> None:
        self._sources.append(source)
        self._tokens.append(np.asarray(tokens, dtype=np.uint32))
        self._num_tokens += len(tokens)
        if self._num_tokens >= self._shard_tokens:
            self._close_shard()

    def finish(self) -> None:
        """Write the last shard and the index."""
        if self._sources:
            self._close_shard()
        shard, row, tokens = np.concatenate([np.empty((3, 0), np.int64), *self._index], axis=1)
        columns = [pa.array(shard, pa.uint32()), pa.array(row, pa.uint32()), pa.array(tokens, pa.uint64())]
        _write(self._folder / INDEX_FILE, pa.record_batch(columns, schema=INDEX_SCHEMA))

    def _close_shard(self) -> None:
        name = f"shards/{len(self.shards):05d}.arrow"
        file = self._folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        lengths = [len(tokens) for tokens in self._tokens]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(self._tokens)))
        batch = pa.record_batch([pa.array(self._sources, pa.string()), tokens], schema=SCHEMA)
        _write(file, batch)
        entry = describe_file(file, name)
        self.shards.append(
            ShardInfo(file=name, documents=len(lengths), tokens=self._num_tokens, size=entry.size, sha256=entry.sha256)
        )
        self._index.append(np.stack([np.full(len(lengths), len(self.shards) - 1), np.arange(len(lengths)), lengths]))
        self._sources, self._tokens, self._num_tokens = [], [], 0


class Shard:
    """One open shard: the tokens of each of its documents, as views of the mapped file."""

    def __init__(self, source: pa.NativeFile) -> None:
        """Raises ValueError when `source` is not a shard."""
        batch = read_batch(source, SCHEMA)
        tokens = batch.column("tokens")
        # The views keep the mapping alive; nothing is copied.
        self._offsets = tokens.offsets.to_numpy()
        self._values = tokens.values.to_numpy(zero_copy_only=True)

    def tokens(self, row: int, start: int, stop: int) -> np.ndarray:
        """uint32 view of tokens start..stop of document `row`."""
        first = int(self._offsets[row])
        return self._values[first + start : first + stop]


def read_batch(source: pa.NativeFile, schema: pa.Schema) -> Any:
    """The one record batch of an Arrow file with these columns.

    Raises:
        ValueError: anything else.
    """
    reader = pa.ipc.open_file(source)
    if reader.schema != schema or reader.num_record_batches != 1:
        raise ValueError(f"not an Arrow file of one batch with columns {', '.join(schema.names)}")
    return reader.get_batch(0)


def _write(file: Path, batch: pa.RecordBatch) -> None:
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
