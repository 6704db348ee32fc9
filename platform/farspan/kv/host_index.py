"""Which block of a prefix cache lies in which slot of host memory, who reads it and who writes it. Pure.

A block is the content of one full page, named by what it holds (kv/prefix.py); a slot has room for one block.
A slot is free, being written by one client, ready, or doomed: its content proved wrong while others still read it.
A ready slot that somebody reads is not given away. What a client reads and writes it gives back when it leaves, and a
client whose process died has left: what it was writing was never ready, so nobody has seen it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from farspan.errors import EngineError

# Of all slots, the part that one client may be writing at a time: it may be frozen.
WRITING_PART = 4


@dataclass(frozen=True, slots=True)
class Block:
    """One full page by name, and the name of the page before it."""

    name: bytes
    before: bytes


@dataclass(frozen=True, slots=True)
class Grant:
    """The right to one slot, until the slot is given to somebody else: then its generation is another."""

    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class Loan(Grant):
    """The right to read a slot, and the digest that its bytes must have."""

    digest: int


@dataclass(frozen=True, slots=True)
class HostCounts:
    """What an index holds, and what happened so far, in blocks."""

    num_slots: int
    num_ready: int
    num_writing: int
    stored: int
    lent: int
    missed: int
    given_away: int
    """To make room."""
    corrupt: int
    """Their bytes were not the ones that were stored."""
    abandoned: int
    """Begun and never finished: the page was used again, or the writer died."""


@dataclass(frozen=True, slots=True)
class HostUse:
    """What one worker moved to and from host memory since it started, in pages."""

    kept: int
    fetched: int
    corrupt: int
    """Their bytes were not the ones that were stored."""
    passed_over: int
    """Not kept, because copying did not keep up."""
    lost: bool
    """The cache cannot be reached any more."""


@dataclass(slots=True)
class _Slot:
    generation: int = 0
    block: Block | None = None
    digest: int = 0
    writer: int | None = None
    num_readers: int = 0


class HostIndex:
    """Slots by the names of the blocks in them, the one used longest ago is given away first."""

    def __init__(self, num_slots: int) -> None:
        self._slots = [_Slot() for _ in range(num_slots)]
        self._free = list(range(num_slots - 1, -1, -1))
        # Used longest ago first.
        self._ready: OrderedDict[bytes, int] = OrderedDict()
        self._coming: dict[bytes, int] = {}
        self._doomed: set[int] = set()
        self._writing: defaultdict[int, set[int]] = defaultdict(set)
        self._reading: defaultdict[int, Counter[int]] = defaultdict(Counter)
        self._happened: Counter[str] = Counter()

    def counts(self) -> HostCounts:
        told = {what: self._happened[what] for what in ("stored", "lent", "missed", "given_away", "corrupt")}
        held = (len(self._slots), len(self._ready), len(self._coming))
        return HostCounts(*held, **told, abandoned=self._happened["abandoned"])

    def find(self, names: Sequence[bytes]) -> list[bool]:
        """Which blocks are here; they count as used."""
        found = [name in self._ready for name in names]
        # Of one sequence, the end is given away before the beginning, without which it is useless.
        for name in reversed(names):
            if name in self._ready:
                self._ready.move_to_end(name)
        return found

    def lend(self, reader: int, names: Sequence[bytes]) -> list[Loan | None]:
        """The slots of these blocks, kept as they are until `settle`; none for a block that is not here."""
        found = self.find(names)
        self._happened["missed"] += found.count(False)
        return [self._lend(reader, name) if here else None for name, here in zip(names, found, strict=True)]

    def settle(self, reader: int, grants: Sequence[Grant]) -> list[bool]:
        """Reading is over. False: the slot was not kept for this reader; what it read there is worth nothing."""
        return [self._settle(reader, grant) for grant in grants]

    def reserve(self, writer: int, blocks: Sequence[Block]) -> list[Grant | None]:
        """A slot to write each block into; none where it is here already (it counts as used), or there is no room."""
        # First: what is here must not make room for what comes after it.
        self.find([block.name for block in blocks])
        return [self._reserve(writer, block) for block in blocks]

    def publish(self, writer: int, loans: Sequence[Loan]) -> list[bool]:
        """The blocks are written, and have these digests: from now on they are found. False: not this writer's."""
        told = [self._publish(writer, loan) for loan in loans]
        published = [self._slots[loan.slot].block for loan, ours in zip(loans, told, strict=True) if ours]
        blocks = [block for block in published if block is not None]
        inner = {block.before for block in blocks}
        for block in blocks:
            if block.name not in inner:
                self._use_up_to(block.name)
        return told

    def abandon(self, writer: int, grants: Sequence[Grant]) -> list[bool]:
        """The slots will not be written. False: not this writer's."""
        return [self._abandon(writer, grant) for grant in grants]

    def drop(self, grants: Sequence[Grant]) -> list[bool]:
        """The bytes of these slots are not the ones that were stored: nobody finds them again."""
        return [self._drop(grant) for grant in grants]

    def leave(self, client: int) -> None:
        """Take back everything a client had."""
        for number in list(self._writing[client]):
            self._abandon(client, Grant(number, self._slots[number].generation))
        for number in list(self._reading[client].elements()):
            self._settle(client, Grant(number, self._slots[number].generation))
        del self._writing[client], self._reading[client]

    def check_integrity(self) -> None:
        """Raises EngineError unless every slot is in exactly one state and belongs to those who have it."""
        states = [set(self._free), set(self._ready.values()), set(self._coming.values()), self._doomed]
        if sum(map(len, states)) != len(self._slots) or len(set().union(*states)) != len(self._slots):
            raise EngineError(f"host slots lost or doubly owned: {[len(state) for state in states]}")
        readers = sum(self._reading.values(), Counter[int]())
        for number, slot in enumerate(self._slots):
            read, written = slot.num_readers > 0, slot.writer is not None
            if slot.num_readers != readers[number] or (written and number not in self._writing[slot.writer or 0]):
                raise EngineError(f"host slot {number} has readers or a writer that do not have it")
            if written != (number in states[2]) or (read and (number in states[0] or number in states[2])):
                raise EngineError(f"host slot {number} is read or written by somebody who may not")
            if number in self._doomed and not read:
                raise EngineError(f"host slot {number} is wrong, and kept for nobody")
        if any(self._block(number).name != name for name, number in (self._ready | self._coming).items()):
            raise EngineError("a host slot is found by a name that is not its own")

    def _block(self, number: int) -> Block:
        block = self._slots[number].block
        assert block is not None, f"slot {number} is empty"
        return block

    def _lend(self, reader: int, name: bytes) -> Loan:
        number = self._ready[name]
        slot = self._slots[number]
        slot.num_readers += 1
        self._reading[reader][number] += 1
        self._happened["lent"] += 1
        return Loan(number, slot.generation, slot.digest)

    def _settle(self, reader: int, grant: Grant) -> bool:
        slot = self._slot_of(grant)
        if slot is None or not self._reading[reader][grant.slot]:
            return False
        slot.num_readers -= 1
        self._reading[reader][grant.slot] -= 1
        if grant.slot in self._doomed and not slot.num_readers:
            self._doomed.remove(grant.slot)
            self._empty(grant.slot)
        return True

    def _reserve(self, writer: int, block: Block) -> Grant | None:
        most = max(1, len(self._slots) // WRITING_PART)
        if block.name in self._ready or block.name in self._coming or len(self._writing[writer]) >= most:
            return None
        number = self._take()
        if number is None:
            return None
        slot = self._slots[number]
        # First the generation, then the content: who still holds the old one is told so.
        slot.generation += 1
        slot.block, slot.writer = block, writer
        self._coming[block.name] = number
        self._writing[writer].add(number)
        return Grant(number, slot.generation)

    def _take(self) -> int | None:
        if self._free:
            return self._free.pop()
        for name, number in self._ready.items():
            if not self._slots[number].num_readers:
                del self._ready[name]
                self._happened["given_away"] += 1
                return number
        return None

    def _publish(self, writer: int, loan: Loan) -> bool:
        slot = self._slot_of(loan)
        if slot is None or slot.writer != writer:
            return False
        name = self._finish(loan.slot)
        slot.digest = loan.digest
        self._ready[name] = loan.slot
        self._happened["stored"] += 1
        return True

    def _use_up_to(self, name: bytes) -> None:
        """A block counts as used, and everything before it later: the beginning is given away last."""
        for _ in range(len(self._ready)):
            number = self._ready.get(name)
            if number is None:
                return
            self._ready.move_to_end(name)
            name = self._block(number).before

    def _abandon(self, writer: int, grant: Grant) -> bool:
        slot = self._slot_of(grant)
        if slot is None or slot.writer != writer:
            return False
        self._finish(grant.slot)
        self._empty(grant.slot)
        self._happened["abandoned"] += 1
        return True

    def _finish(self, number: int) -> bytes:
        """Nobody writes the slot any more; the name of its block."""
        slot, name = self._slots[number], self._block(number).name
        assert slot.writer is not None
        self._writing[slot.writer].discard(number)
        slot.writer = None
        del self._coming[name]
        return name

    def _drop(self, grant: Grant) -> bool:
        slot = self._slot_of(grant)
        if slot is None or slot.block is None or self._ready.get(slot.block.name) != grant.slot:
            return False
        del self._ready[slot.block.name]
        self._happened["corrupt"] += 1
        if slot.num_readers:
            self._doomed.add(grant.slot)
        else:
            self._empty(grant.slot)
        return True

    def _empty(self, number: int) -> None:
        self._slots[number].block = None
        self._free.append(number)

    def _slot_of(self, grant: Grant) -> _Slot | None:
        """None when it was given to somebody else since, or never existed."""
        if not 0 <= grant.slot < len(self._slots):
            return None
        slot = self._slots[grant.slot]
        return slot if slot.generation == grant.generation else None
