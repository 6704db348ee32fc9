"""Which ranges of one long space are taken. Pure: the space may be a file, a device mapping, or nothing at all."""

from __future__ import annotations

from bisect import bisect_left, insort


class Extents:
    """Hands out ranges [start, start + size) of [0, capacity): the smallest hole that fits, lowest address first."""

    def __init__(self, capacity: int) -> None:
        self._holes: list[tuple[int, int]] = [(0, capacity)] if capacity else []

    def take(self, size: int) -> int | None:
        """The start of a free range, now taken; none where no hole is large enough."""
        fitting = [(length, start) for start, length in self._holes if length >= size]
        if not fitting:
            return None
        length, start = min(fitting)
        self._holes.remove((start, length))
        if length > size:
            insort(self._holes, (start + size, length - size))
        return start

    def give(self, start: int, size: int) -> None:
        """A range is free again, and one hole with its free neighbours."""
        index = bisect_left(self._holes, (start, 0))
        if index < len(self._holes) and start + size == self._holes[index][0]:
            size += self._holes.pop(index)[1]
        if index and sum(self._holes[index - 1]) == start:
            start, length = self._holes.pop(index - 1)
            size += length
        insort(self._holes, (start, size))

    @property
    def holes(self) -> tuple[tuple[int, int], ...]:
        """(start, size) of what is free, in address order."""
        return tuple(self._holes)

    @property
    def largest(self) -> int:
        """The largest size that `take` could give now."""
        return max((size for _, size in self._holes), default=0)
