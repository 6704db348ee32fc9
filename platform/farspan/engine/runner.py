"""Turn a decision into one packed forward. Shapes: T packed tokens, B decode rows, N pages of a row, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from farspan.engine.attention import DecodeRows, PagedBatch, Segment
from farspan.engine.probe import forward
from farspan.kernels.attention.dispatch import choose_backend
from farspan.kernels.attention.limits import Ask
from farspan.kv.pages import PagePool

# Decode gathers the pages of a group of rows side by side, one layer at a time: at most this much, or one row.
_GATHER_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one sequence to compute: `tokens` follow `past` tokens that are already in `pages`."""

    tokens: Sequence[int]
    past: int
    pages: Sequence[int]
    num_logits: int = 1
    """Logits wanted: those of the last so many tokens."""


class Runner:
    """The model and its pages."""

    def __init__(self, model: PreTrainedModel, pool: PagePool, gather_bytes: int = _GATHER_BYTES) -> None:
        self._model, self._pool = model, pool
        self._gather_pages = gather_bytes * pool.layout.num_layers // pool.layout.page_bytes
        keys, values = pool.keys_PSGD(0), pool.values_PSGC(0)
        self._kernel = choose_backend(Ask.of(keys, values)).forward

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Logits [R, V]: the `num_logits` last tokens of each piece, in the given order."""
        # Single tokens first, shortest context first: neighbours are attended together, the longer pieces one each.
        order = sorted(range(len(pieces)), key=lambda i: (len(pieces[i].tokens) > 1, pieces[i].past))
        packed = [pieces[i] for i in order]
        batch, tokens_T, positions_T = self._pack(packed)
        keep, back = kept_rows(pieces, order)
        logits_RV = forward(self._model, tokens_T, positions_T, batch, keep)
        assert logits_RV.shape[0] == len(keep), "the model ignored logits_to_keep"
        return logits_RV[back.to(logits_RV.device)]

    def _pack(self, pieces: Sequence[Piece]) -> tuple[PagedBatch, Tensor, Tensor]:
        device, size = self._pool.device, self._pool.layout.page_tokens
        tokens_T = torch.tensor([token for piece in pieces for token in piece.tokens])
        positions_T = torch.cat([torch.arange(p.past, p.past + len(p.tokens)) for p in pieces])
        pages = [torch.tensor(piece.pages, device=device) for piece in pieces]
        slots_T = positions_T.to(device)
        owner_T = torch.repeat_interleave(torch.tensor([len(p.tokens) for p in pieces]))
        starts = torch.tensor([0] + [len(p) for p in pages]).cumsum(0)[:-1].to(device)
        page_T = torch.cat(pages)[starts[owner_T.to(device)] + slots_T // size]
        rows = [(piece, table) for piece, table in zip(pieces, pages, strict=True) if len(piece.tokens) == 1]
        segments: list[Segment] = []
        start = len(rows)
        for piece, table in zip(pieces[len(rows) :], pages[len(rows) :], strict=True):
            past_pages = table[: self._pool.layout.num_pages(piece.past)]
            segments.append(Segment(start, len(piece.tokens), piece.past, past_pages))
            start += len(piece.tokens)
        batch = PagedBatch(self._pool, self._kernel, page_T, slots_T % size, self._decode_rows(rows), tuple(segments))
        return batch, tokens_T, positions_T

    def _decode_rows(self, rows: Sequence[tuple[Piece, Tensor]]) -> tuple[DecodeRows, ...]:
        widths = [self._pool.layout.num_pages(piece.past + 1) for piece, _ in rows]
        groups = group_rows(widths, self._gather_pages)
        return tuple(self._decode_group(rows[group.start : group.stop], group.start) for group in groups)

    def _decode_group(self, rows: Sequence[tuple[Piece, Tensor]], start: int) -> DecodeRows:
        layout, device = self._pool.layout, self._pool.device
        num_keys = torch.tensor([piece.past + 1 for piece, _ in rows], device=device)
        width = max(layout.num_pages(piece.past + 1) for piece, _ in rows)
        # Filled up with a page of the row itself: a foreign page may hold anything, even NaN.
        tables_BN = torch.stack([_padded(table[:width], width) for _, table in rows])
        visible_BS = torch.arange(width * layout.page_tokens, device=device)[None, :] < num_keys[:, None]
        return DecodeRows(start, tables_BN, visible_BS)


def kept_rows(pieces: Sequence[Piece], order: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(packed tokens whose logits are wanted, where each wanted row of `pieces` is among them).

    The pieces are packed in `order`.
    """
    keep: list[int] = []
    starts = [0] * len(pieces)
    end = 0
    for i in order:
        end += len(pieces[i].tokens)
        starts[i] = len(keep)
        keep += range(end - pieces[i].num_logits, end)
    back = [row for start, p in zip(starts, pieces, strict=True) for row in range(start, start + p.num_logits)]
    return torch.tensor(keep), torch.tensor(back)


def group_rows(widths: Sequence[int], most_pages: int) -> list[range]:
    """Rows to gather together, given the pages of each row in ascending order.

    Every row of a group is filled up to its widest: a group is at most `most_pages` so filled up, or one row.
    """
    groups: list[range] = []
    for row, width in enumerate(widths):
        if groups and (row + 1 - groups[-1].start) * width <= most_pages:
            groups[-1] = range(groups[-1].start, row + 1)
        else:
            groups.append(range(row, row + 1))
    return groups


def _padded(table: Tensor, width: int) -> Tensor:
    return torch.cat([table, table[:1].expand(width - len(table))])
