"""What a transport does: the receiving side reads pages and epochs out of another process.

Pull-based, so that a source never writes into memory it does not own.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from farspan.kv.ticket import SourceAddress


class ReadStatus(StrEnum):
    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


class Read(Protocol):
    """One posted read."""

    def status(self) -> ReadStatus:
        """DONE and FAILED are final: after them nothing writes local memory any more."""
        ...

    def close(self) -> None:
        """Give back what the read holds; only after a final status."""
        ...


class EpochRead(Read, Protocol):
    def epochs(self) -> list[int]:
        """Epochs of the pages asked for, in their order; only after DONE."""
        ...


class Transport(Protocol):
    """One process's end. Serves its own pool to others and reads theirs into it."""

    name: str

    def address(self) -> SourceAddress:
        """Where others reach this process's pages."""
        ...

    def read_pages(self, source: SourceAddress, remote: list[int], local: list[int]) -> Read:
        """Start reading whole pages of `source` into local pages. Raises TransferError when it cannot start."""
        ...

    def read_epochs(self, source: SourceAddress, remote: list[int]) -> EpochRead:
        """Start reading the current epochs of pages of `source`. Raises TransferError when it cannot start."""
        ...

    def close(self) -> None:
        """Stop serving. The pool may be freed afterwards."""
        ...
