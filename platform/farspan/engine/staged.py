"""What a decode step is about, always at the same places of the device's memory: the input of captured graphs.

A step is written into one buffer of host memory and copied in one go; only tables, whose rows are as long as the
longest of this step, are then laid out on the device, at rows that are always equally far apart.

Shapes: B rows of a step, R rows there is room for, G groups of layers, N pages of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from farspan.engine.attention import DecodeRows, first_visible
from farspan.models.rules import LayerRule

Key: TypeAlias = tuple[LayerRule, int]
"""Layers that read one table: what a token sees, and the group of layers whose pages they are."""
_LONG, _INT = 8, 4
# Tables and their rows begin where a kernel may read 16 bytes at once.
_ALIGNED = 16


class NextToken(Protocol):
    """One token of a sequence to compute, after `past` that are in `pages`."""

    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def past(self) -> int: ...
    @property
    def pages(self) -> Sequence[int]: ...


@dataclass(frozen=True, slots=True)
class Room:
    """How much a step may be."""

    rows: int
    pages: int
    """Of one sequence in one group."""
    page_tokens: int
    num_groups: int
    num_pages: int
    """Of the pool."""

    def width(self, rule: LayerRule) -> int:
        """Most pages that a token sees under a rule."""
        spans = [span for span in (rule.window, rule.chunk) if span is not None]
        # A span may begin and end within a page.
        seen = min([self.pages, *(span // self.page_tokens + 2 for span in spans)])
        return -(-seen // _ALIGNED) * _ALIGNED


class StagedRows:
    """The next step's rows on the device."""

    def __init__(self, room: Room, keys: Sequence[Key], device: torch.device) -> None:
        self._room, self._keys, self._device = room, list(keys), device
        rows = -(-room.rows // _ALIGNED) * _ALIGNED
        num_long = rows * (3 + room.num_groups)
        num_int = rows * sum(1 + room.width(rule) for rule, _ in self._keys)
        num_bytes = num_long * _LONG + num_int * _INT
        self._host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._sent = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._tables = {
            key: torch.zeros(rows, room.width(key[0]), dtype=torch.int32, device=device) for key in self._keys
        }
        self._head_bytes = num_long * _LONG + rows * len(self._keys) * _INT
        self._there = _Head.of(self._sent, rows, room.num_groups, self._keys)
        here = _Head.of(self._host, rows, room.num_groups, self._keys)
        self._tokens, self._positions, self._slots, self._pages = (
            x.numpy() for x in (here.tokens_R, here.positions_R, here.slots_R, here.pages_RG)
        )
        self._lengths = {key: x.numpy() for key, x in here.lengths_R.items()}
        self._host_tables = self._host[self._head_bytes :].view(torch.int32).numpy()
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def tokens_B(self, rows: int) -> Tensor:
        return self._there.tokens_R[:rows]

    def positions_B(self, rows: int) -> Tensor:
        return self._there.positions_R[:rows]

    def slots_B(self, rows: int) -> Tensor:
        return self._there.slots_R[:rows]

    def pages_BG(self, rows: int) -> Tensor:
        return self._there.pages_RG[:rows]

    def parts(self, rows: int) -> dict[Key, list[DecodeRows]]:
        """What attention of the layers of each key reads."""
        return {key: [DecodeRows(0, self._tables[key][:rows], self._there.lengths_R[key][:rows])] for key in self._keys}

    def stage(self, pieces: Sequence[NextToken], rows: int) -> None:
        """Put the next tokens of sequences there, filled up to `rows` with copies of the one that sees least.

        A copy computes what its original does, and writes the same to the same place.
        """
        if self._copied is not None:
            # The copy of the step before may not have read its buffer yet.
            self._copied.synchronize()
        least = min(pieces, key=lambda piece: piece.past)
        filled = [*pieces, *[least] * (rows - len(pieces))]
        past_B = np.array([piece.past for piece in filled], np.int64)
        tables = [np.array(piece.pages, np.int64).reshape(-1, self._room.num_groups) for piece in filled]
        self._tokens[:rows] = [piece.tokens[0] for piece in filled]
        self._positions[:rows] = past_B
        self._slots[:rows] = past_B % self._room.page_tokens
        places = (past_B // self._room.page_tokens).tolist()
        for row, (table_NG, place) in enumerate(zip(tables, places, strict=True)):
            self._pages[row] = table_NG[place]
        start, laid = 0, []
        for key in self._keys:
            width = self._write_table(key, filled, tables, start)
            laid.append((self._tables[key][:rows, :width], start))
            start += rows * width
        self._send(laid, start)

    def _write_table(self, key: Key, filled: Sequence[NextToken], tables: Sequence[np.ndarray], start: int) -> int:
        """Lengths and pages of one key; gives how many pages the longest row has."""
        (rule, group), size = key, self._room.page_tokens
        firsts = [first_visible(piece.past, rule) // size for piece in filled]
        lengths = [piece.past + 1 - first * size for piece, first in zip(filled, firsts, strict=True)]
        self._lengths[key][: len(filled)] = lengths
        width = -(-max(lengths) // size)
        assert width <= self._tables[key].shape[1], "a sequence longer than any that was expected"
        wide = np.zeros((len(filled), width), np.int64)
        for row, (first, length, table_NG) in enumerate(zip(firsts, lengths, tables, strict=True)):
            count = -(-length // size)
            wide[row, :count] = table_NG[first : first + count, group]
        # A page that is gone must not become another's by losing its upper bits.
        assert wide.max() < self._room.num_pages, "a row sees a page that was given back"
        self._host_tables[start : start + wide.size] = wide.ravel()
        return width

    def _send(self, laid: Sequence[tuple[Tensor, int]], num_entries: int) -> None:
        """`laid`: where each table goes, and at which entry of what is sent it begins."""
        num_bytes = self._head_bytes + num_entries * _INT
        self._sent[:num_bytes].copy_(self._host[:num_bytes], non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))
        sent = self._sent[self._head_bytes :].view(torch.int32)
        for table_BN, start in laid:
            table_BN.copy_(sent[start : start + table_BN.numel()].view(table_BN.shape))


@dataclass(frozen=True, slots=True)
class _Head:
    """What has one entry for each row, cut out of a buffer."""

    tokens_R: Tensor
    positions_R: Tensor
    slots_R: Tensor
    pages_RG: Tensor
    lengths_R: Mapping[Key, Tensor]

    @classmethod
    def of(cls, buffer: Tensor, rows: int, num_groups: int, keys: Sequence[Key]) -> _Head:
        num_long = rows * (3 + num_groups)
        long = buffer[: num_long * _LONG].view(torch.int64)
        whole = buffer[num_long * _LONG :][: rows * len(keys) * _INT].view(torch.int32)
        pages_RG = long[3 * rows :].view(rows, num_groups)
        lengths_R = {key: whole[i * rows : (i + 1) * rows] for i, key in enumerate(keys)}
        return cls(long[:rows], long[rows : 2 * rows], long[2 * rows : 3 * rows], pages_RG, lengths_R)
