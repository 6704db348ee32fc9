"""An object store in one process, and who is reachable over it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from farspan.errors import TransferError
from farspan.kv.transports.object_store import PageSource


class Store:
    """It keeps no object: somebody who waits for it does."""

    def __init__(self) -> None:
        self.sources: dict[str, PageSource] = {}
        self.held = False
        """Whether answers wait until `release`."""
        self.objects: list[weakref.ref[Future[Any]]] = []
        self.num_put = 0
        self._later: list[Callable[[], None]] = []

    def open(self, source: PageSource) -> StoreExchange:
        self.sources[source.incarnation] = source
        return StoreExchange(self, source.incarnation)

    def ask(self, source: str, read: Callable[[PageSource], Any]) -> Future[Any]:
        asked: Future[Any] = Future()
        self.objects.append(weakref.ref(asked))

        def answer() -> None:
            if not asked.set_running_or_notify_cancel():
                return
            try:
                if source not in self.sources:
                    raise TransferError(source, "the source does not answer")
                asked.set_result(read(self.sources[source]))
                self.num_put += 1
            except TransferError as problem:
                asked.set_exception(problem)

        self._later.append(answer)
        if not self.held:
            self.release()
        return asked

    @property
    def num_held(self) -> int:
        return sum(asked() is not None for asked in self.objects)

    def release(self) -> None:
        """Everything that was asked is answered, with what lies there now."""
        later, self._later = self._later, []
        for answer in later:
            answer()


class StoreExchange:
    def __init__(self, store: Store, incarnation: str) -> None:
        self._store, self._incarnation = store, incarnation

    def ask_pages(self, source: str, pages: list[int], within_s: float) -> Future[bytes]:
        assert within_s > 0
        return self._store.ask(source, lambda there: there.copy_pages(pages))

    def ask_epochs(self, source: str, pages: list[int], within_s: float) -> Future[list[int]]:
        assert within_s > 0
        return self._store.ask(source, lambda there: there.epochs(pages))

    def close(self) -> None:
        del self._store.sources[self._incarnation]
