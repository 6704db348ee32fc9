"""Turn a decision into one packed forward. Shapes: T packed tokens, B decode rows, N pages of a row, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from farspan.engine.attention import DecodeRows, PagedBatch, Segment, first_visible
from farspan.engine.lowrank import BASE, LowRank
from farspan.engine.probe import forward
from farspan.engine.recurrent import BatchStates, PackedCache, Stretch
from farspan.engine.survey import Survey
from farspan.kernels.paged_decode.dispatch import gathers
from farspan.kv.pages import PagePool
from farspan.kv.states import StatePool
from farspan.models.rules import LayerRule

# From how many shared pages and rows on reading them once is faster than two calls are slower.
_LEAST_SHARED_PAGES, _LEAST_SHARING_ROWS = 8, 4
# Where decode gathers the pages of a group of rows side by side, one layer at a time: at most this much, or one row.
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
    adapter: str = BASE


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
        lowrank: LowRank | None = None,
    ) -> None:
        self._model, self._pool, self._states, self.survey = model, pool, states, survey
        self._stepwise, self._lowrank = stepwise, lowrank or LowRank()
        layout = pool.layout
        self._gather_pages = gather_bytes * layout.num_layers // max(1, layout.page_bytes)
        self._rules = {call.rule for call in survey.calls}
        self._gathers = {call.rule for call in survey.calls if gathers(call.pages)}
        self._shell = None if states is None else PackedCache(model.config, None)

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Logits [R, V]: the `num_logits` last tokens of each piece, in the given order."""
        # Single tokens first: neighbours are attended together, the longer pieces one each.
        # With states, those that continue a sequence go before those that begin one, which have no state yet.
        begins_last = self._states is not None
        order = sorted(
            range(len(pieces)),
            key=lambda i: (
                len(pieces[i].tokens) > 1,
                begins_last and pieces[i].past == 0,
                self._beginning(pieces[i]),
                pieces[i].past,
            ),
        )
        packed = [pieces[i] for i in order]
        tokens_T = torch.tensor([token for piece in packed for token in piece.tokens])
        positions_T = torch.cat([torch.arange(p.past, p.past + len(p.tokens)) for p in packed])
        keep, back = kept_rows(pieces, order)
        batch, cache = self._pack(packed, positions_T), self._cache(packed)
        with self._lowrank.over([(piece.adapter, len(piece.tokens)) for piece in packed]):
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
        self._shell.states = BatchStates(self._states, stretches, stepwise=self._stepwise, window=self._lowrank.window)
        return self._shell

    def _beginning(self, piece: Piece) -> int:
        """Same for sequences that may share pages; where pages are gathered, rows of like length belong together."""
        return piece.pages[0] if piece.pages and not self._gathers and len(piece.tokens) == 1 else 0

    def _pack(self, pieces: Sequence[Piece], positions_T: Tensor) -> PagedBatch:
        size = self._pool.layout.page_tokens
        rows = [piece for piece in pieces if len(piece.tokens) == 1]
        places = positions_T.numpy() // size
        pages = np.empty(len(places), np.int64)
        pages[: len(rows)] = [piece.pages[piece.past // size] for piece in rows]
        segments: list[Segment] = []
        start = len(rows)
        for piece in pieces[len(rows) :]:
            segments.append(self._segment(piece, start))
            end = start + len(piece.tokens)
            pages[start:end] = np.asarray(piece.pages)[places[start:end]]
            start = end
        parts = {rule: [*self._decode_parts(rows, rule), *segments] for rule in self._rules}
        page_T, slot_T = (x.to(self._pool.device) for x in (torch.from_numpy(pages), positions_T % size))
        return PagedBatch(self._pool, self.survey.calls, page_T, slot_T, parts)

    def _segment(self, piece: Piece, start: int) -> Segment:
        pages_N = torch.tensor(piece.pages, dtype=torch.long, device=self._pool.device)
        return Segment(start, len(piece.tokens), piece.past, pages_N)

    def _decode_parts(self, rows: Sequence[Piece], rule: LayerRule) -> list[DecodeRows | Segment]:
        """Single tokens by the kernel over pages: together, those that share a beginning by themselves."""
        size = self._pool.layout.page_tokens
        if rule.chunk is not None and rule.chunk % size:
            # Its beginnings lie within pages, where the kernel does not begin.
            return [self._segment(piece, start) for start, piece in enumerate(rows)]
        seen = [seen_pages(piece.past, rule, size) for piece in rows]
        if rule in self._gathers:
            groups = [(group, 0) for group in group_rows([len(pages) for pages in seen], self._gather_pages)]
        else:
            groups = sharing_rows(rows, size) if rule.window is None and rule.chunk is None else []
            groups = groups or [(range(len(rows)), 0)] * bool(rows)
        return [self._decode_rows(rows, seen, *group) for group in groups]

    def _decode_rows(self, rows: Sequence[Piece], seen: Sequence[range], group: range, shared: int) -> DecodeRows:
        """`shared`: pages that the rows of a group have in common, which lead the tables of none of them."""
        size, device = self._pool.layout.page_tokens, self._pool.device
        own = [range(seen[row].start + shared, seen[row].stop) for row in group]
        tables = np.zeros((len(own), max(map(len, own))), np.int32)
        for place, (row, pages) in enumerate(zip(group, own, strict=True)):
            tables[place, : len(pages)] = rows[row].pages[pages.start : pages.stop]
        lengths = [rows[row].past + 1 - pages.start * size for row, pages in zip(group, own, strict=True)]
        tables_BN = torch.from_numpy(tables).to(device)
        lengths_B = torch.tensor(lengths, dtype=torch.int32, device=device)
        if not shared:
            return DecodeRows(group.start, tables_BN, lengths_B)
        prefix_N = torch.tensor(rows[group.start].pages[:shared], dtype=torch.int32, device=device)
        prefix_length_1 = torch.tensor([shared * size], dtype=torch.int32, device=device)
        return DecodeRows(group.start, tables_BN, lengths_B, prefix_N, prefix_length_1)


def seen_pages(past: int, rule: LayerRule, page_tokens: int) -> range:
    """Which pages of a sequence of `past` tokens its next token sees, by their place in the sequence."""
    return range(first_visible(past, rule) // page_tokens, past // page_tokens + 1)


def sharing_rows(rows: Sequence[Piece], page_tokens: int) -> list[tuple[range, int]]:
    """Neighbours that begin with the same pages, and how many those are; all other neighbours share 0.

    A page that a row still writes is its own. Few pages or rows are not worth a second call.
    """
    groups: list[tuple[range, int]] = []
    start = 0
    while start < len(rows):
        end, shared = start + 1, rows[start].past // page_tokens
        while end < len(rows):
            common = _common(rows[start], rows[end], min(shared, rows[end].past // page_tokens))
            if common < max(_LEAST_SHARED_PAGES, shared // 2):
                break
            end, shared = end + 1, common
        if end - start >= _LEAST_SHARING_ROWS:
            groups.append((range(start, end), shared))
        elif groups and groups[-1][1] == 0:
            groups[-1] = (range(groups[-1][0].start, end), 0)
        else:
            groups.append((range(start, end), 0))
        start = end
    return groups


def _common(a: Piece, b: Piece, most: int) -> int:
    """How many of the first pages are the same. Equal pages follow equal pages: the first that differ end it."""
    if list(a.pages[:most]) == list(b.pages[:most]):
        return most
    return next(i for i in range(most) if a.pages[i] != b.pages[i])


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
