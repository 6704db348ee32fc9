"""What may happen to one transfer of KV pages, or to a part of one, as a pure function.

    OFFERED -> PULLING -> LANDED -> CHECKED -> COMMITTED
         \\         \\         \\        \\
          \\         \\         `--------`--> FAILED        the transport is done: the local pages are free
           \\         `--> QUARANTINED -> FAILED           it may still write: nobody owns the local pages
            `--> FAILED

A request never waits for a quarantined transfer: it fails at once and its pages wait alone. Parts of one transfer are
adopted together; when one fails, the others are abandoned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class State(StrEnum):
    OFFERED = "offered"
    PULLING = "pulling"
    LANDED = "landed"
    CHECKED = "checked"
    COMMITTED = "committed"
    QUARANTINED = "quarantined"
    FAILED = "failed"


class Event(StrEnum):
    STARTED = "started"
    """The read of the pages was posted."""
    LANDED = "landed"
    """The transport reports all bytes here, and the epochs are being read."""
    BROKEN = "broken"
    """The transport reports that the transfer ended without its bytes."""
    LATE = "late"
    """The deadline passed while the transport was still at work."""
    ABANDONED = "abandoned"
    """Nobody wants the pages any more (a cancelled request) while the transport was still at work."""
    VERIFIED = "verified"
    """Digests and epochs are those of the ticket."""
    FOREIGN = "foreign"
    """A digest or an epoch is not the ticket's."""
    ADOPTED = "adopted"
    """The engine took the pages."""
    OVER = "over"
    """The transport reports that a quarantined transfer has ended, well or badly."""


_NEXT: dict[tuple[State, Event], State] = {
    (State.OFFERED, Event.STARTED): State.PULLING,
    (State.PULLING, Event.LANDED): State.LANDED,
    (State.PULLING, Event.BROKEN): State.FAILED,
    (State.PULLING, Event.LATE): State.QUARANTINED,
    (State.PULLING, Event.ABANDONED): State.QUARANTINED,
    # The data is here and only the small epoch read is open: it writes into a buffer of its own, never into a page.
    (State.LANDED, Event.BROKEN): State.FAILED,
    (State.LANDED, Event.LATE): State.QUARANTINED,
    (State.LANDED, Event.ABANDONED): State.QUARANTINED,
    (State.LANDED, Event.VERIFIED): State.CHECKED,
    (State.LANDED, Event.FOREIGN): State.FAILED,
    (State.CHECKED, Event.ADOPTED): State.COMMITTED,
    (State.CHECKED, Event.ABANDONED): State.FAILED,
    (State.QUARANTINED, Event.OVER): State.FAILED,
}


@dataclass(frozen=True, slots=True)
class Transfer:
    """One transfer's place in the picture above."""

    state: State = State.OFFERED
    reason: str = ""
    """Why it failed or was quarantined; empty otherwise."""

    @property
    def over(self) -> bool:
        return self.state in (State.COMMITTED, State.FAILED)

    def after(self, event: Event, reason: str = "") -> Transfer:
        """The transfer after `event`. An event that cannot happen in this state is our bug: AssertionError."""
        assert (self.state, event) in _NEXT, f"{event} cannot happen while {self.state}"
        return replace(self, state=_NEXT[self.state, event], reason=self.reason or reason)
