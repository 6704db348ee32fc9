"""What a decode step is about, always at the same places of the device's memory: the input of captured graphs.

A step is written into one buffer of host memory and copied in one go; only tables, whose rows are as long as the
longest of this step, are then laid out on the device, at rows that are always equally far apart. Where the same
sequences go on, their tokens never leave the device, and a table that only grows gets its new pages there.

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
from farspan.engine.warp import send
from farspan.models.rules import LayerRule

Key: TypeAlias = tuple[LayerRule, int]
"""Layers that read one table: what a token sees, and the group of layers whose pages they are."""
_LONG, _INT = 8, 4
# Tables and their rows begin where a kernel may read 16 bytes at once.
_ALIGNED = 16


class NextToken(Protocol):
    """One token of a sequence to compute, after `past` that are in `pages`, at a `position` that may be further."""

    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def past(self) -> int: ...
    @property
    def position(self) -> int: ...
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
        # Where the device is the host, there is nothing to send.
        self._sent = torch.zeros(num_bytes, dtype=torch.uint8, device=device) if device.type == "cuda" else self._host
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
        self._past_R, self._ahead_R = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self._all_R, self._places_N = np.arange(rows), np.arange(room.pages)
        # What is known of the rows' own tables: a page of each group for each place.
        self._known_RNG = np.zeros((rows, room.pages, room.num_groups), np.int64)
        self._num_rows = self._least = 0
        self._source_B = torch.empty(0)
        self.num_staged = 0
        """How often other rows were staged."""

    @property
    def num_rows(self) -> int:
        """Rows there is room for."""
        return self._room.rows

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
        self._wait()
        count, groups = len(pieces), self._room.num_groups
        self._past_R[:count] = [piece.past for piece in pieces]
        self._least = int(self._past_R[:count].argmin())
        self._past_R[count:rows] = self._past_R[self._least]
        self._ahead_R[:count] = [piece.position - piece.past for piece in pieces]
        self._ahead_R[count:rows] = self._ahead_R[self._least]
        self._tokens[:count] = [piece.tokens[0] for piece in pieces]
        self._tokens[count:rows] = self._tokens[self._least]
        for row, piece in enumerate(pieces):
            table = np.array(piece.pages, np.int64)
            places = len(table) // groups
            assert places <= self._room.pages, "a sequence longer than any that was expected"
            self._known_RNG[row, :places] = table.reshape(places, groups)
        self._known_RNG[count:rows] = self._known_RNG[self._least]
        self._num_rows, self._source_B = count, torch.empty(0)
        self.num_staged += 1
        self._write_heads(rows)
        self._send(self._keys, rows)

    def stage_next(self, grown: Sequence[tuple[int, Sequence[int]]], tokens_N: Tensor, rows: int) -> None:
        """Put the tokens there that follow those of the step before, chosen by now on the device.

        `grown`: (row, its page of each group) of every row whose token is the first of a place.
        """
        self._wait()
        count, size = self._num_rows, self._room.page_tokens
        self._past_R[:rows] += 1
        for row, pages in grown:
            copies = [row, *range(count, rows)] if row == self._least else row
            self._known_RNG[copies, self._past_R[row] // size] = pages
        self._write_heads(rows)
        self._send([key for key in self._keys if _slides(key[0])], rows)
        if rows > count and not len(self._source_B):
            source = [*range(count), *[self._least] * (rows - count)]
            self._source_B = send(source, torch.long, self._device)
        self._there.tokens_R[:rows].copy_(tokens_N[self._source_B] if rows > count else tokens_N)
        if grown:
            self._add_pages([key for key in self._keys if not _slides(key[0])], rows)

    def _wait(self) -> None:
        if self._copied is not None:
            # The copy of the step before may not have read its buffer yet.
            self._copied.synchronize()

    def _write_heads(self, rows: int) -> None:
        past_B, size = self._past_R[:rows], self._room.page_tokens
        self._positions[:rows] = past_B + self._ahead_R[:rows]
        self._slots[:rows] = past_B % size
        self._pages[:rows] = self._known_RNG[self._all_R[:rows], past_B // size]
        assert self._pages[:rows].max() < self._room.num_pages, "a row writes to a page that was given back"
        for key in self._keys:
            self._lengths[key][:rows] = past_B + 1 - first_visible(past_B, key[0]) // size * size

    def _write_table(self, key: Key, rows: int, start: int) -> int:
        """Pages of one key; gives how many pages the longest row has."""
        (rule, group), size = key, self._room.page_tokens
        first_B = first_visible(self._past_R[:rows], rule) // size
        count_B = self._past_R[:rows] // size + 1 - first_B
        width = int(count_B.max())
        assert width <= self._tables[key].shape[1], "a sequence longer than any that was expected"
        known_BN = self._known_RNG[:rows, :width, group]
        if _slides(rule):
            places_BN = np.minimum(first_B[:, None] + self._places_N[:width], self._room.pages - 1)
            known_BN = self._known_RNG[self._all_R[:rows, None], places_BN, group]
        wide_BN = np.where(self._places_N[:width] < count_B[:, None], known_BN, 0)
        # A page that is gone must not become another's by losing its upper bits.
        assert wide_BN.max() < self._room.num_pages, "a row sees a page that was given back"
        self._host_tables[start : start + wide_BN.size] = wide_BN.ravel()
        return width

    def _send(self, keys: Sequence[Key], rows: int) -> None:
        """What all rows have, and whole tables of these keys."""
        start, laid = 0, []
        for key in keys:
            width = self._write_table(key, rows, start)
            laid.append((self._tables[key][:rows, :width], start))
            start += rows * width
        if self._copied is not None:
            num_bytes = self._head_bytes + start * _INT
            self._sent[:num_bytes].copy_(self._host[:num_bytes], non_blocking=True)
            self._copied.record(torch.cuda.current_stream(self._device))
        sent = self._sent[self._head_bytes :].view(torch.int32)
        for table_BN, start in laid:
            table_BN.copy_(sent[start : start + table_BN.numel()].view(table_BN.shape))

    def _add_pages(self, keys: Sequence[Key], rows: int) -> None:
        """Each row's own page, once more where it is there already."""
        for key in keys:
            place_B1 = (self._there.lengths_R[key][:rows, None].long() - 1) // self._room.page_tokens
            page_B1 = self._there.pages_RG[:rows, key[1] : key[1] + 1].int()
            self._tables[key][:rows].scatter_(1, place_B1, page_B1)


def _slides(rule: LayerRule) -> bool:
    """Whether tables of a rule lose their first pages."""
    return rule.window is not None or rule.chunk is not None


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
