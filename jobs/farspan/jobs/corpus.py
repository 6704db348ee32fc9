"""A corpus whose records are read and tokenized by many processes: Ray Data carries, the pure build counts and writes.

Every worker turns whole files into tokens; the order of files is kept, so that shards and manifest are those of the
build in one process, byte for byte. See docs/decisions/0020-corpora.md.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data.context import DataContext

from farspan.config.load import dump_config, parse_config
from farspan.config.schema import CorpusConfig
from farspan.data.corpus import Report, build_corpus
from farspan.data.encode import Encoded, EncodeTask, RecordEncoder, read_batches
from farspan.data.manifest import CorpusManifest
from farspan.data.sources import SourceFile
from farspan.errors import ClusterError, FarspanError

# Files a worker takes at a time, and at most this many batches of them are asked for.
_FILES_PER_BLOCK = 16
_MOST_BLOCKS = 4096
_FETCH_TIMEOUT_S = 300.0
# One thread per worker: there is one worker for each CPU. Both are switches of the tokenizers library.
_WORKER_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}


def build_corpus_parallel(config: CorpusConfig, progress: Report) -> CorpusManifest:
    """`build_corpus` on the Ray this process is connected to; sources must be readable from every node.

    Raises:
        ClusterError: a worker died again and again. And what `build_corpus` raises.
    """
    return build_corpus(config, progress, encode=encode_with_ray)


def encode_with_ray(task: EncodeTask) -> Iterator[list[Encoded]]:
    """Every answer to a task, in order, from all CPUs of the cluster; finished blocks wait in Ray's object store."""
    tokenizer = {file.name: file.read_bytes() for file in sorted(task.tokenizer.iterdir())}
    items = [
        {"number": number, "name": f.name, "folder": f.folder, "path": f.path, "size": f.size, "version": f.version}
        for number, f in enumerate(task.files, start=task.first_file)
    ]
    if not items:
        return
    workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
    blocks = min(len(items), max(workers, -(-len(items) // _FILES_PER_BLOCK)), _MOST_BLOCKS)
    kept = ray.put(tokenizer)
    try:
        found = _dataset(items, blocks).map_batches(
            _Worker,
            # A reference in a list is fetched by the worker: the files are not copied into the arguments of every one.
            fn_constructor_args=(dump_config(task.config), [kept], task.first_file, task.done_records),
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
            num_cpus=1,
            runtime_env={"env_vars": _WORKER_ENVIRONMENT},
        )
        with _quiet():
            for batch in found.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
                yield _answers(batch)
    except ray.exceptions.RayError as problem:
        raise _cause(problem) from None


def _dataset(items: list[dict[str, Any]], blocks: int) -> ray.data.Dataset:
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    with DataContext.current(context):
        return ray.data.from_items(items, override_num_blocks=blocks)


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data's own account of its plan goes to its log files; the screen is the progress bar's."""
    logger = logging.getLogger("ray.data")
    level, disabled = logger.level, logger.disabled
    logger.disabled = False
    logger.setLevel(logging.ERROR)
    handlers = [(handler, handler.level) for handler in logger.handlers]
    for handler, _ in handlers:
        handler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.disabled = disabled
        for handler, before in handlers:
            handler.setLevel(before)


class _Worker:
    """One process that encodes whole files."""

    def __init__(self, config: str, tokenizer: list[ray.ObjectRef], first_file: int, done_records: int) -> None:
        self._config = parse_config(CorpusConfig, config)
        self._first_file, self._done_records = first_file, done_records
        with tempfile.TemporaryDirectory(prefix="farspan-tokenizer-") as name:
            for file, data in ray.get(tokenizer[0], timeout=_FETCH_TIMEOUT_S).items():
                (Path(name) / file).write_bytes(data)
            self._encoder = RecordEncoder(self._config, Path(name))

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """Answers to the files of a block, a table for every batch of records."""
        for row in block.to_pylist():
            number = row.pop("number")
            done = self._done_records if number == self._first_file else 0
            task = EncodeTask(self._config, (SourceFile(**row),), number, done, Path())
            for batch in read_batches(task):
                yield _table(self._encoder.encode(batch))


def _table(answers: list[Encoded]) -> pa.Table:
    spans = [answer.spans_N2.reshape(-1) if answer.spans_N2 is not None else None for answer in answers]
    numbers = pa.large_list(pa.uint32())
    return pa.table(
        {
            "file": pa.array([answer.file for answer in answers], pa.int64()),
            "record": pa.array([answer.record for answer in answers], pa.int64()),
            "name": pa.array([answer.name for answer in answers], pa.string()),
            "tokens": pa.array([answer.tokens for answer in answers], numbers),
            "spans": pa.array(spans, numbers),
            "problem": pa.array([answer.problem for answer in answers], pa.string()),
        }
    )


def _answers(table: pa.Table) -> list[Encoded]:
    columns = [table.column(name).to_pylist() for name in ("file", "record", "name", "problem")]
    arrays = [partial(_numbers, table.column(name)) for name in ("tokens", "spans")]
    answers = []
    for row, (file, record, name, problem) in enumerate(zip(*columns, strict=True)):
        tokens, spans = (read(row) for read in arrays)
        spans_N2 = spans.reshape(-1, 2) if spans is not None else None
        answers.append(Encoded(file, record, name, tokens, spans_N2, problem))
    return answers


def _numbers(column: pa.ChunkedArray, row: int) -> Any:
    values = column[row].values
    return None if values is None else values.to_numpy(zero_copy_only=False).astype(np.uint32, copy=False)


def _cause(problem: BaseException) -> FarspanError:
    """Our own error out of the layers Ray wraps around it."""
    seen: BaseException | None = problem
    while seen is not None:
        # Ray's error is also an instance of its cause, with a traceback for a message.
        if isinstance(seen, FarspanError) and not isinstance(seen, ray.exceptions.RayError):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    return ClusterError(f"tokenizing on Ray failed: {str(problem).strip().splitlines()[-1]}; look at Ray's logs")
