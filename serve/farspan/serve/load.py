"""What the ingress knows of every worker: a snapshot each, how old it is, and what was sent there since."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

_NAME_BYTES = 8
# The newest pages of a cache; older ones are found too, but nobody is sent there for them.
MOST_NAMES = 8192
# How many times as old as stale: until then the names of its pages are kept for a worker that is only slow.
_FORGOTTEN = 10


@dataclass(frozen=True, slots=True)
class Identity:
    """Which worker it is."""

    worker: str
    deployment: str
    incarnation: str
    kind: str
    """Class of machine: equal ones take equally long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """What one worker says of itself. Torch-free: it travels to the ingress twice a second."""

    worker: str
    """Its replica."""
    deployment: str
    incarnation: str
    """Differs between two processes of the same replica."""
    weights: str
    """Fingerprint of its model: an answer begun with one goes on with no other."""
    layout: str
    """Fingerprint of its pages: only equal ones are exchanged."""
    kind: str
    """Class of machine: equal ones take equally long."""
    page_tokens: int
    token_bytes: float
    """Of KV that travel for each token of a prompt."""
    max_batch_tokens: int
    max_sequences: int
    prefill_tokens: int | None = None
    """Most tokens of prompts in an iteration while others decode; none: as many as there is room for."""
    decode_tokens: int | None = None
    """Most sequences that decode in an iteration while prompts wait; none: all."""
    queue_tokens: int = 0
    """Of prompts, waiting or under way, not computed yet."""
    oldest_wait_s: float = 0.0
    """How long the first of those prompts has been here."""
    num_running: int = 0
    """Sequences that decode."""
    num_waiting: int = 0
    """Sequences whose prompt is not computed."""
    kv_tokens: int = 0
    """Tokens that the running sequences look at."""
    free_tokens: int = 0
    """Tokens of KV there is room for."""
    pool_tokens: int = 0
    """Tokens of KV there is room for when nothing runs."""
    open_leases: int = 0
    travels: bool = True
    """Whether its pages are all that another worker needs to go on."""
    prefixes: bytes | None = None
    """Names of cached pages, the first 8 bytes of each; none: as told before."""
    prefix_version: int = 0
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Digest of each adapter by its name: names of pages depend on it."""


@dataclass(slots=True)
class _Known:
    load: WorkerLoad
    at_s: float
    prefixes: frozenset[int]
    sent: list[tuple[float, int]] = field(default_factory=list)
    """(when, tokens) of prompts that were sent there since the snapshot was asked for."""


class LoadTable:
    """The newest snapshot of every worker. Times are of one clock of the caller."""

    def __init__(self, stale_s: float) -> None:
        self._stale_s = stale_s
        self._known: dict[str, _Known] = {}

    def __len__(self) -> int:
        return len(self._known)

    def put(self, load: WorkerLoad, asked_at_s: float, now_s: float) -> None:
        """A snapshot that was asked for at `asked_at_s`. One that is older than what is known changes nothing."""
        before = self._known.get(load.worker)
        if before is not None and before.at_s > asked_at_s:
            return
        again = before is not None and before.load.incarnation == load.incarnation
        if load.prefixes is not None:
            prefixes = names_in(load.prefixes)
        else:
            prefixes = before.prefixes if before is not None and again else frozenset()
        sent = [] if before is None else [(at_s, tokens) for at_s, tokens in before.sent if at_s > asked_at_s]
        self._known[load.worker] = _Known(replace(load, prefixes=None), asked_at_s, prefixes, sent)
        self._forget_old(now_s)

    def forget(self, worker: str) -> None:
        """A worker that is gone; unknown ones are no error."""
        self._known.pop(worker, None)

    def version(self, worker: str) -> int:
        """Of the names known of a worker; -1: none."""
        known = self._known.get(worker)
        return -1 if known is None else known.load.prefix_version

    def fresh(self, now_s: float) -> list[WorkerLoad]:
        """Workers that were heard of lately, with what was sent to them since."""
        return [_with_sent(known) for known in self._known.values() if now_s - known.at_s <= self._stale_s]

    def sent(self, worker: str, num_tokens: int, now_s: float) -> None:
        """A prompt goes to a worker: until its next snapshot shows it, it is counted here."""
        known = self._known.get(worker)
        if known is not None:
            known.sent.append((now_s, num_tokens))

    def found(self, names: Iterable[bytes], page_tokens: int) -> dict[str, int]:
        """Tokens at the beginning of a prompt that each worker has; `names`: of its pages, in order, made as needed."""
        left = {worker: known.prefixes for worker, known in self._known.items() if known.prefixes}
        found: dict[str, int] = {}
        if not left:
            return found
        for name in names:
            number = int.from_bytes(name[:_NAME_BYTES], "little")
            left = {worker: prefixes for worker, prefixes in left.items() if number in prefixes}
            if not left:
                break
            for worker in left:
                found[worker] = found.get(worker, 0) + page_tokens
        return found

    def _forget_old(self, now_s: float) -> None:
        for worker, known in list(self._known.items()):
            if now_s - known.at_s > _FORGOTTEN * self._stale_s:
                del self._known[worker]


def digest(names: Sequence[bytes]) -> bytes:
    """The newest names, as they travel."""
    return b"".join(name[:_NAME_BYTES] for name in names[-MOST_NAMES:])


def names_in(prefixes: bytes) -> frozenset[int]:
    if len(prefixes) % _NAME_BYTES:
        raise ValueError(f"names of pages must be whole, got {len(prefixes)} bytes for names of {_NAME_BYTES}")
    return frozenset(struct.unpack(f"<{len(prefixes) // _NAME_BYTES}Q", prefixes))


def _with_sent(known: _Known) -> WorkerLoad:
    if not known.sent:
        return known.load
    load = known.load
    return replace(
        load,
        queue_tokens=load.queue_tokens + sum(tokens for _, tokens in known.sent),
        num_waiting=load.num_waiting + len(known.sent),
    )
