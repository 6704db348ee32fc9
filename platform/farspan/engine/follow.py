"""A rank that follows: the same batches as the leader's on its own heads, and its own part of every page that moves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from transformers import PreTrainedModel

from farspan.config.schema import EngineConfig
from farspan.engine.cut import Share
from farspan.engine.faster import speed_up
from farspan.engine.gang import Gang, Word
from farspan.engine.orders import read_changes, read_fetch, read_pieces, write_sources
from farspan.engine.path import Path, open_path
from farspan.errors import TransferError
from farspan.kv.pages import PagePool
from farspan.kv.transports.base import Read, ReadStatus, Transport

# Numbers in which an address travels: that of NIXL has a few kilobytes.
ADDRESS_NUMBERS = 8192
# What a fetch is told by.
STATUSES = (ReadStatus.PENDING, ReadStatus.DONE, ReadStatus.FAILED)


def follow(
    model: PreTrainedModel,
    config: EngineConfig,
    share: Share,
    open_transport: Callable[[PagePool], Transport] | None = None,
) -> None:
    """Compute what the leader tells, until it ends the engine. Takes the model over.

    `open_transport`: for an engine whose pages travel. Raises what `open_path` raises, and EngineError when the leader
    or another rank is lost.
    """
    path = open_path(model, config, share)
    speed_up(model)
    _Follower(path, share.gang, open_transport).run()


class _Follower:
    def __init__(self, path: Path, gang: Gang, open_transport: Callable[[PagePool], Transport] | None) -> None:
        self._path, self._gang, self._open_transport = path, gang, open_transport
        self._transport: Transport | None = None
        self._reads: dict[int, Read] = {}
        self._ended: dict[int, ReadStatus] = {}

    def run(self) -> None:
        try:
            while self._turn():
                pass
        finally:
            if self._transport is not None:
                self._transport.close()

    def _turn(self) -> bool:
        word, numbers = self._gang.hear()
        if word is Word.END:
            return False
        changes, body = read_changes(numbers)
        self._path.pool.mirror(changes)
        if word is Word.RUN:
            self._path.runner.run(read_pieces(body))
        else:
            self._gang.collect(self._answer(word, body))
        return True

    def _answer(self, word: Word, body: np.ndarray) -> np.ndarray:
        if word is Word.BEAT:
            return np.zeros(1, np.int64)
        if word is Word.DIGEST:
            return np.array(self._path.pool.digests(body.tolist()), np.uint64).view(np.int64)
        if word is Word.ADDRESS:
            return self._address()
        if word is Word.FETCH:
            self._fetch(body)
            return np.zeros(0, np.int64)
        assert word is Word.POLL
        return self._poll(body.tolist())

    def _address(self) -> np.ndarray:
        assert self._open_transport is not None, "this engine has no transport"
        self._transport = self._open_transport(self._path.pool)
        told = write_sources([self._transport.address()])
        assert len(told) <= ADDRESS_NUMBERS, "an address is short"
        return np.concatenate([told, np.zeros(ADDRESS_NUMBERS - len(told), np.int64)])

    def _fetch(self, body: np.ndarray) -> None:
        assert self._transport is not None, "a fetch comes after the address"
        fetch = read_fetch(body)
        source = fetch.sources[self._gang.rank - 1]
        try:
            self._reads[fetch.number] = self._transport.read_pages(source, list(fetch.remote), list(fetch.local))
        except TransferError:
            self._ended[fetch.number] = ReadStatus.FAILED

    def _poll(self, numbers: list[int]) -> np.ndarray:
        """How fetches stand. All that are not over on every rank are asked for: the others can be forgotten."""
        for number in numbers:
            read = self._reads.get(number)
            if read is not None and (status := read.status()) is not ReadStatus.PENDING:
                self._reads.pop(number).close()
                self._ended[number] = status
        self._ended = {number: self._ended[number] for number in numbers if number in self._ended}
        return np.array([STATUSES.index(self._ended.get(n, ReadStatus.PENDING)) for n in numbers], np.int64)
