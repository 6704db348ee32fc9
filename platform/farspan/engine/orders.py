"""What a leader tells the other ranks for one iteration, as numbers: pages that got content, and what is computed."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from farspan.engine.lowrank import BASE
from farspan.engine.runner import Piece

# Of a piece: its tokens, its past, its pages, its logits.
_COUNTS = 4


@dataclass(frozen=True, slots=True)
class Order:
    """One iteration."""

    changes: Sequence[tuple[int, int]]
    """What `PagePool.mirror` takes, before anything is computed."""
    pieces: Sequence[Piece]


def write_order(order: Order) -> np.ndarray:
    """int64: how many changes and pieces, the changes, the counts of every piece, their tokens, their pages."""
    pieces = order.pieces
    assert all(piece.adapter == BASE and piece.state is None for piece in pieces), "ranks have no adapters, no states"
    counts = [(len(p.tokens), p.past, len(p.pages), p.num_logits) for p in pieces]
    parts = [
        np.array([len(order.changes), len(pieces)], np.int64),
        np.array(order.changes, np.int64).reshape(-1),
        np.array(counts, np.int64).reshape(-1),
        *(np.array(piece.tokens, np.int64) for piece in pieces),
        *(np.array(piece.pages, np.int64) for piece in pieces),
    ]
    return np.concatenate(parts)


def read_order(numbers: np.ndarray) -> Order:
    """What was written."""
    num_changes, num_pieces = numbers[:2].tolist()
    changes, numbers = numbers[2 : 2 + 2 * num_changes].reshape(-1, 2), numbers[2 + 2 * num_changes :]
    counts, numbers = numbers[: _COUNTS * num_pieces].reshape(-1, _COUNTS), numbers[_COUNTS * num_pieces :]
    lengths = [*counts[:, 0].tolist(), *counts[:, 2].tolist()]
    parts = np.split(numbers, np.cumsum(lengths))
    assert len(parts[-1]) == 0, "an order is read to its end"
    tokens, pages = parts[:num_pieces], parts[num_pieces:-1]
    pieces = [
        Piece(t.tolist(), past, array("q", p.tobytes()), num_logits=num_logits)
        for t, p, (_, past, _, num_logits) in zip(tokens, pages, counts.tolist(), strict=True)
    ]
    return Order([(page, source) for page, source in changes.tolist()], pieces)
