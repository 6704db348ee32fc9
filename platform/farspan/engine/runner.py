"""Turn a decision into one packed forward. Shapes: T packed tokens, B decode rows, N pages of a row, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from farspan.engine.attention import DecodeRows, PagedBatch, Segment, first_visible
from farspan.engine.probe import forward
from farspan.engine.recurrent import BatchStates, PackedCache, Stretch
from farspan.engine.survey import Survey
from farspan.kv.pages import PagePool
from farspan.kv.states import StatePool
from farspan.models.rules import LayerRule

# Decode gathers the pages of a group of rows side by side, one layer at a time: at most this much, or one row.
_GATHER_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one sequence to compute: `tokens` follow `past` tokens that are already in `pages` and `state`."""

    tokens: Sequence[int]
    past: int
    pages: Sequence[int]
    state: int | None = None
    """Slot of the sequence's recurrent state, for a model that has one."""
    num_logits: int = 1
    """Logits wanted: those of the last so many tokens."""


class Runner:
    """The model, its pages and its states: a batch is one forward."""

    def __init__(
        self,
        model: PreTrainedModel,
        pool: PagePool,
        survey: Survey,
        states: StatePool | None = None,
        *,
        stepwise: bool = False,
        gather_bytes: int = _GATHER_BYTES,
    ) -> None:
        self._model, self._pool, self._states, self.survey = model, pool, states, survey
        self._stepwise = stepwise
        layout = pool.layout
        self._gather_pages = gather_bytes * layout.layers_of_page // max(1, layout.page_bytes)
        self._calls = [replace(call, group=layout.group_of(call.store)) for call in survey.calls]
        self._rules = {call.rule for call in survey.calls}
        self._tables = {(call.rule, call.group) for call in self._calls}
        self._shell = None if states is None else PackedCache(model.config, None)

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Logits [R, V]: the `num_logits` last tokens of each piece, in the given order."""
        # Single tokens first, shortest context first: neighbours are attended together, the longer pieces one each.
        # With states, those that continue a sequence go before those that begin one, which have no state yet.
        begins_last = self._states is not None
        order = sorted(
            range(len(pieces)),
            key=lambda i: (len(pieces[i].tokens) > 1, begins_last and pieces[i].past == 0, pieces[i].past),
        )
        packed = [pieces[i] for i in order]
        tokens_T = torch.tensor([token for piece in packed for token in piece.tokens])
        positions_T = torch.cat([torch.arange(p.past, p.past + len(p.tokens)) for p in packed])
        keep, back = kept_rows(pieces, order)
        batch, cache = self._pack(packed, positions_T), self._cache(packed)
        logits_RV = forward(self._model, tokens_T, positions_T, batch, keep, cache)
        return logits_RV[back.to(logits_RV.device)]

    def _cache(self, pieces: Sequence[Piece]) -> PackedCache | None:
        if self._states is None or self._shell is None:
            return None
        stretches: list[Stretch] = []
        start = 0
        for piece in pieces:
            assert piece.state is not None, "a model with states needs one for each sequence"
            stretches.append(Stretch(start, len(piece.tokens), piece.state, fresh=piece.past == 0))
            start += len(piece.tokens)
        self._shell.states = BatchStates(self._states, stretches, stepwise=self._stepwise)
        return self._shell

    def _pack(self, pieces: Sequence[Piece], positions_T: Tensor) -> PagedBatch:
        device, size = self._pool.device, self._pool.layout.page_tokens
        groups = self._pool.layout.num_groups
        tables = (torch.from_numpy(np.array(piece.pages, dtype=np.int64)) for piece in pieces)
        pages = [table.to(device).view(-1, groups) for table in tables]
        slots_T = positions_T.to(device)
        owner_T = torch.repeat_interleave(torch.tensor([len(p.tokens) for p in pieces]))
        starts = torch.tensor([0] + [len(p) for p in pages]).cumsum(0)[:-1].to(device)
        page_TG = torch.cat(pages)[starts[owner_T.to(device)] + slots_T // size]
        rows = [(piece, table) for piece, table in zip(pieces, pages, strict=True) if len(piece.tokens) == 1]
        segments: list[Segment] = []
        start = len(rows)
        for piece, table in zip(pieces[len(rows) :], pages[len(rows) :], strict=True):
            segments.append(Segment(start, len(piece.tokens), piece.past, table))
            start += len(piece.tokens)
        decode = {
            (rule, group): self._decode_rows([(piece, table_NG[:, group]) for piece, table_NG in rows], rule)
            for rule, group in self._tables
        }
        return PagedBatch(self._pool, self._calls, page_TG, slots_T % size, decode, segments)

    def _decode_rows(self, rows: Sequence[tuple[Piece, Tensor]], rule: LayerRule) -> tuple[DecodeRows, ...]:
        widths = [len(self._seen(piece.past, rule)) for piece, _ in rows]
        groups = group_rows(widths, self._gather_pages)
        return tuple(self._decode_group(rows[group.start : group.stop], group.start, rule) for group in groups)

    def _decode_group(self, rows: Sequence[tuple[Piece, Tensor]], start: int, rule: LayerRule) -> DecodeRows:
        size, device = self._pool.layout.page_tokens, self._pool.device
        seen = [self._seen(piece.past, rule) for piece, _ in rows]
        width = max(map(len, seen))
        # Filled up with a page of the row itself: a foreign page may hold anything, even NaN.
        tables = [_padded(table[pages.start : pages.stop], width) for (_, table), pages in zip(rows, seen, strict=True)]
        first_B = torch.tensor([pages.start * size for pages in seen], device=device)
        positions_BS = first_B[:, None] + torch.arange(width * size, device=device)[None, :]
        low_B = torch.tensor([first_visible(piece.past, rule) for piece, _ in rows], device=device)
        last_B = torch.tensor([piece.past for piece, _ in rows], device=device)
        visible_BS = (positions_BS >= low_B[:, None]) & (positions_BS <= last_B[:, None])
        return DecodeRows(start, torch.stack(tables), visible_BS)

    def _seen(self, past: int, rule: LayerRule) -> range:
        """Which pages of a sequence of `past` tokens its next token sees, by their place in the sequence."""
        size = self._pool.layout.page_tokens
        return range(first_visible(past, rule) // size, past // size + 1)


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
    """Rows to gather together, given the pages of each row.

    Every row of a group is filled up to its widest: a group is at most `most_pages` so filled up, or one row.
    """
    groups: list[range] = []
    widest = 0
    for row, width in enumerate(widths):
        widest = max(widest, width)
        if groups and (row + 1 - groups[-1].start) * widest <= most_pages:
            groups[-1] = range(groups[-1].start, row + 1)
        else:
            groups.append(range(row, row + 1))
            widest = width
    return groups


def _padded(table: Tensor, width: int) -> Tensor:
    return torch.cat([table, table[:1].expand(width - len(table))])
