"""What a leader tells the other ranks, as int64 numbers: which pages got content, and then what to do."""

from __future__ import annotations

import base64
import json
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from farspan.engine.lowrank import BASE
from farspan.engine.runner import Piece
from farspan.kv.ticket import SourceAddress

# Of a piece: its tokens, its past, its pages, its logits, what is left out.
_COUNTS = 5


@dataclass(frozen=True, slots=True)
class Fetch:
    """Pages that every rank reads from the same rank of another worker."""

    number: int
    """Of the fetch: it is asked for by that."""
    sources: Sequence[SourceAddress]
    """Of the ranks after the leader, in their order."""
    remote: Sequence[int]
    local: Sequence[int]


def write_changes(changes: Sequence[tuple[int, int]], body: np.ndarray) -> np.ndarray:
    """What `PagePool.mirror` takes, before `body` is carried out."""
    return np.concatenate([np.array([len(changes)], np.int64), np.array(changes, np.int64).reshape(-1), body])


def read_changes(numbers: np.ndarray) -> tuple[list[tuple[int, int]], np.ndarray]:
    """(changes, body)."""
    end = 1 + 2 * int(numbers[0])
    return [(page, source) for page, source in numbers[1:end].reshape(-1, 2).tolist()], numbers[end:]


def write_pieces(pieces: Sequence[Piece]) -> np.ndarray:
    """Their number, the counts of each, the tokens of all, the pages of all."""
    assert all(piece.adapter == BASE and piece.state is None for piece in pieces), "ranks have no adapters, no states"
    counts = [(len(p.tokens), p.past, len(p.pages), p.num_logits, p.left_out) for p in pieces]
    parts = [
        np.array([len(pieces)], np.int64),
        np.array(counts, np.int64).reshape(-1),
        *(np.array(piece.tokens, np.int64) for piece in pieces),
        *(np.array(piece.pages, np.int64) for piece in pieces),
    ]
    return np.concatenate(parts)


def read_pieces(numbers: np.ndarray) -> list[Piece]:
    """What was written."""
    num_pieces = int(numbers[0])
    counts, rest = np.split(numbers[1:], [_COUNTS * num_pieces])
    counts = counts.reshape(-1, _COUNTS)
    parts = np.split(rest, np.cumsum([*counts[:, 0], *counts[:, 2]], dtype=np.int64))
    assert len(parts[-1]) == 0, "pieces are read to their end"
    tokens, pages = parts[:num_pieces], parts[num_pieces:-1]
    return [
        Piece(t.tolist(), past, array("q", p.tobytes()), num_logits=num_logits, left_out=left_out)
        for t, p, (_, past, _, num_logits, left_out) in zip(tokens, pages, counts.tolist(), strict=True)
    ]


def write_fetch(fetch: Fetch) -> np.ndarray:
    """Its number, how many pages, there and here, and the sources as text."""
    head = [fetch.number, len(fetch.remote), *fetch.remote, *fetch.local]
    return np.concatenate([np.array(head, np.int64), write_sources(fetch.sources)])


def read_fetch(numbers: np.ndarray) -> Fetch:
    """What was written."""
    number, count = numbers[:2].tolist()
    remote, local, sources = np.split(numbers[2:], [count, 2 * count])
    return Fetch(number, read_sources(sources), remote.tolist(), local.tolist())


def write_sources(sources: Sequence[SourceAddress]) -> np.ndarray:
    """Length of the text in bytes, and the text."""
    plain = [{**asdict(s), "metadata": base64.b64encode(s.metadata).decode(), "ranks": ()} for s in sources]
    text = json.dumps(plain).encode()
    padded = text + bytes(-len(text) % 8)
    return np.concatenate([np.array([len(text)], np.int64), np.frombuffer(padded, np.int64)])


def read_sources(numbers: np.ndarray) -> list[SourceAddress]:
    """What was written; numbers behind it are left alone."""
    plain = json.loads(numbers[1:].tobytes()[: int(numbers[0])])
    return [SourceAddress(**{**p, "metadata": base64.b64decode(p["metadata"]), "ranks": ()}) for p in plain]
