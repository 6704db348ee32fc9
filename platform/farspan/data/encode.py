"""Records -> tokens, one batch after another: the part of a build that any process can do for any file. Pure order:
the same files give the same answers in the same order, however they are cut into batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np

from farspan.config.schema import CorpusConfig
from farspan.data.chat import ChatEncoder
from farspan.data.records import EMPTY, Record, file_kind, read_records
from farspan.data.sources import SourceFile
from farspan.data.tokenizer import open_encoder
from farspan.errors import CorruptDataError

_BATCH_RECORDS = 64
_BATCH_CHARACTERS = 1 << 22
_READERS = 8
_NOTHING = np.empty(0, np.uint32)


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of record number `record` of file number `file`: its tokens, or the reason why it has none.

    `spans_N2` are the tokens that are trained, [start, stop) each; none: all of them.
    """

    file: int
    record: int
    name: str
    tokens: np.ndarray
    spans_N2: np.ndarray | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class EncodeTask:
    """What is left to do: `files` from number `first_file` on, without the first `done_records` of the first one."""

    config: CorpusConfig
    files: tuple[SourceFile, ...]
    first_file: int
    done_records: int
    tokenizer: Path


Batch = list[tuple[int, int, Record]]
"""(file number, record number in it, record)."""
Encode = Callable[[EncodeTask], Iterator[list[Encoded]]]


class RecordEncoder:
    """The tokenizer of a corpus, for texts or for conversations."""

    def __init__(self, config: CorpusConfig, tokenizer: Path) -> None:
        self._config = config
        self._plain = open_encoder(tokenizer, str(tokenizer))
        self._chat: ChatEncoder | None = None
        if config.format == "chat":
            self._chat = ChatEncoder(tokenizer, None, config.train_on)

    def encode(self, batch: Batch) -> list[Encoded]:
        """The answers to a batch, in order."""
        if self._chat is None:
            return self._texts(batch)
        return [self._conversation(*entry) for entry in batch]

    def _conversation(self, file: int, number: int, record: Record) -> Encoded:
        assert self._chat is not None
        answer = self._chat.encode(record.messages) if record.problem is None else record.problem
        if isinstance(answer, str):
            return Encoded(file, number, record.name, _NOTHING, problem=answer)
        ids, spans_N2 = answer
        return Encoded(file, number, record.name, ids, spans_N2)

    def _texts(self, batch: Batch) -> list[Encoded]:
        ids = iter(self._plain.encode([record.text for _, _, record in batch if record.problem is None]))
        end = self._plain.eos_token_id
        return [
            Encoded(file, number, record.name, _NOTHING, problem=record.problem)
            if record.problem is not None
            else Encoded(file, number, record.name, np.asarray([*next(ids), end], dtype=np.uint32))
            for file, number, record in batch
        ]


def refuse_bad(answer: Encoded) -> None:
    """Raises CorruptDataError for a record that cannot be used; an empty text holds nothing, and is not bad."""
    if answer.problem is not None and answer.problem != EMPTY:
        raise CorruptDataError(answer.name, f"{answer.problem}; correct the record or set on_bad=skip")


def encode_here(task: EncodeTask) -> Iterator[list[Encoded]]:
    """Every answer to a task, in order, in this process; the tokenizers library uses all its cores."""
    encoder = RecordEncoder(task.config, task.tokenizer)
    yield from map(encoder.encode, read_batches(task))


def read_batches(task: EncodeTask) -> Iterator[Batch]:
    """The records of a task, in order; small files are read ahead."""
    numbered = list(enumerate(task.files, start=task.first_file))
    with ThreadPoolExecutor(_READERS, thread_name_prefix="corpus-reader") as pool:
        for whole, group in groupby(numbered, key=lambda entry: file_kind(entry[1].path) == "text"):
            if whole:
                yield from _whole_files(list(group), task, pool)
            else:
                for file, source in group:
                    yield from _record_file(file, source, task)


def _whole_files(files: list[tuple[int, SourceFile]], task: EncodeTask, pool: ThreadPoolExecutor) -> Iterator[Batch]:
    for start in range(0, len(files), _BATCH_RECORDS):
        ahead = files[start : start + _BATCH_RECORDS]
        texts = pool.map(lambda entry: list(read_records(entry[1], task.config)), ahead)
        batch = [
            (file, number, record)
            for (file, _), records in zip(ahead, texts, strict=True)
            for number, record in enumerate(records)
        ]
        yield [entry for entry in batch if entry[1] >= _done(entry[0], task)]


def _record_file(file: int, source: SourceFile, task: EncodeTask) -> Iterator[Batch]:
    batch: Batch = []
    size = 0
    for number, record in islice(enumerate(read_records(source, task.config)), _done(file, task), None):
        batch.append((file, number, record))
        size += len(record.text)
        if len(batch) == _BATCH_RECORDS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


def _done(file: int, task: EncodeTask) -> int:
    return task.done_records if file == task.first_file else 0
