"""What a running training asks of the world around it; a plain process has nothing around it."""

from __future__ import annotations

from typing import Protocol


class Outside(Protocol):
    """The launcher's side of a rank."""

    def settle(self) -> None:
        """Return once every event told so far would survive the death of this process and of the one that watches."""
        ...

    def notice(self) -> str | None:
        """Why this run should stop after the step it is in, where this rank was told; cheap, not collective."""
        ...

    def preempted(self) -> str | None:
        """Which machine is about to be taken away; the same answer on every rank, asked by all of them together."""
        ...


class NothingOutside:
    """No launcher: nothing to wait for and nobody to stop for."""

    def settle(self) -> None:
        return

    def notice(self) -> str | None:
        return None

    def preempted(self) -> str | None:
        return None
