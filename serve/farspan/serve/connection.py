"""One connection of a client, where no proxy stands before the ingress."""

from __future__ import annotations

import asyncio
from asyncio import TimerHandle
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

# Of a head, or of what comes behind the last piece of a body.
_MOST_LOOSE_BYTES = 65536
# A connection that is used sees its end coming; one that is not may be cut off.
_LEAVING_S = 1.0


class Connection(HttpToolsProtocol):
    """uvicorn's, which has no clock for whoever connects and does not ask, or asks and does not read, no limit for what
    is neither a body nor a whole head, and sees only of its newest request that the client is gone.
    """

    def __init__(self, *args: Any, head_timeout_s: float, **settings: Any) -> None:
        """`head_timeout_s`: for all that comes before a body, and for the next byte of an answer to be taken."""
        super().__init__(*args, **settings)
        self._head_timeout_s = head_timeout_s
        self._clock: TimerHandle | None = None
        self._reader_clock: TimerHandle | None = None
        self._num_loose = 0
        self._is_leaving = False
        self._cycles: list[RequestResponseCycle] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's are none by their class.
        super().connection_made(cast(asyncio.Transport, transport))
        self._await_head()

    def data_received(self, data: bytes) -> None:
        self._num_loose += len(data)
        super().data_received(data)
        if self._num_loose > _MOST_LOOSE_BYTES and not self.transport.is_closing():
            self._refuse_head()
        self._await_head()

    def on_headers_complete(self) -> None:
        self._num_loose = 0
        self._stop_clock()
        # Of an upgrade its parser takes what follows for the next request, and not for a body.
        is_last = self._is_leaving or self.parser.should_upgrade()
        if is_last:
            self.headers.append((b"connection", b"close"))
        super().on_headers_complete()
        if is_last:
            self.cycle.keep_alive = False
        self._cycles = [*(cycle for cycle in self._cycles if not cycle.response_complete), self.cycle]

    def on_body(self, body: bytes) -> None:
        self._num_loose = 0
        super().on_body(body)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        self._stop_reader_clock()
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        # A request may be on its way: whoever asks now hears that it was the last time.
        if self._is_answering():
            super().shutdown()
        elif not self._is_leaving:
            self._is_leaving = True
            self.loop.call_later(_LEAVING_S, self.shutdown)
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._stop_reader_clock()
        super().resume_writing()

    def _await_head(self) -> None:
        # Bytes that are no head do not lengthen it: the clock of a kept connection ends with the first one.
        if self._clock is None and not self._is_answering() and not self.transport.is_closing():
            self._clock = self.loop.call_later(self._head_timeout_s, self.transport.abort)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse_head(self) -> None:
        if self._is_answering():
            self.transport.close()
        else:
            self.send_400_response(f"The head of a request must not have more than {_MOST_LOOSE_BYTES} bytes.")

    def _await_reader(self, num_unsent: int) -> None:
        self._reader_clock = self.loop.call_later(self._head_timeout_s, self._see_reader, num_unsent)

    def _stop_reader_clock(self) -> None:
        if self._reader_clock is not None:
            self._reader_clock.cancel()
            self._reader_clock = None

    def _see_reader(self, before: int) -> None:
        if (num_unsent := self.transport.get_write_buffer_size()) < before:
            self._await_reader(num_unsent)
        else:
            self.transport.abort()
