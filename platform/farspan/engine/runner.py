"""Turn a decision into one packed forward. Shapes: T packed tokens, B decode rows, N pages of a row, V vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from farspan.engine.attention import BoundTokens, DecodeRows, PagedBatch, Segment, first_visible
from farspan.engine.capture import Capture
from farspan.engine.graphs import DecodeGraphs, ladder
from farspan.engine.lowrank import BASE, LowRank
from farspan.engine.probe import forward
from farspan.engine.recurrent import BatchStates, PackedCache, Stretch
from farspan.engine.staged import Room
from farspan.engine.survey import Survey
from farspan.errors import ModelError
from farspan.kernels.paged_decode.dispatch import gathers
from farspan.kv.pages import PagePool
from farspan.kv.states import StatePool
from farspan.models.rules import LayerRule

# From how many shared pages and rows on reading them once is faster than two calls are slower.
_LEAST_SHARED_PAGES, _LEAST_SHARING_ROWS = 8, 4
# What a device reads while it is given the kernels of a layer one by one: sharing less than that is no gain.
_LAUNCH_BYTES = {"cuda": 1 << 30, "cpu": 8 << 20}
# Rows times shared pages of one call: its scores are in memory at once.
_MOST_SHARED_ENTRIES = 1 << 18
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
    left_out: int = 0
    """Tokens of the sequence before these that have no slot: so far are positions ahead of slots. Those that have one
    may lie in any order."""

    @property
    def position(self) -> int:
        """Of the first of `tokens` in the sequence."""
        return self.past + self.left_out


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
        launch_bytes: int | None = None,
    ) -> None:
        self._model, self._pool, self._states, self.survey = model, pool, states, survey
        self._stepwise, self._lowrank = stepwise, lowrank or LowRank()
        layout = pool.layout
        self._gather_pages = gather_bytes * layout.layers_of_page // max(1, layout.page_bytes)
        self._calls = [replace(call, group=layout.group_of(call.store)) for call in survey.calls]
        self._tables = {(call.rule, call.group) for call in self._calls}
        self._slides = any(rule.window is not None or rule.chunk is not None for rule, _ in self._tables)
        self._gathers = {(call.rule, call.group) for call in self._calls if gathers(call.pages)}
        # Sequences with one beginning share the pages of layers that see everything. On a CPU a soft cap would take the
        # call for the beginning, which has many queries, to the slow reference.
        whole = {(r, group) for r, group in self._tables - self._gathers if r.window is None and r.chunk is None}
        self._shares = set() if survey.capped and pool.device.type == "cpu" else whole
        self._sharing = next((group for _, group in self._shares), None)
        if launch_bytes is None:
            launch_bytes = _LAUNCH_BYTES.get(pool.device.type, 0)
        self._least_saved_pages = launch_bytes * layout.layers_of_page // max(1, layout.page_bytes)
        self._graphs: DecodeGraphs | None = None
        self._tokens = BoundTokens()
        self._shell = None if states is None else PackedCache(model.config, None)

    def capture(self, most_rows: int, most_tokens: int, capture: Capture, *, later: bool = False) -> None:
        """From now on decode is one launch, for up to `most_rows` sequences of at most `most_tokens`.

        `later`: not until a number of rows has been asked for often; then what a forward raises is only logged.

        Raises ModelError for what is never captured, and whatever else a forward raises that cannot be.
        """
        layout, num_pages = self._pool.layout, self._pool.num_pages
        size = layout.page_tokens
        if self._states is not None:
            raise ModelError("its recurrent layers go on from states whose places are known on the host")
        if any(rule.chunk is not None and rule.chunk % size for rule, _ in self._tables):
            raise ModelError(f"its chunks begin within pages; use an engine.page_tokens that divides them, not {size}")
        if self._gathers and (later or self._pool.device.type == "cuda"):
            raise ModelError("its pages are copied side by side, which costs the longest sequence in every step")
        pages = min(layout.num_places(most_tokens), num_pages)
        room = Room(most_rows if later else ladder(most_rows)[-1], pages, size, layout.num_groups, num_pages)
        graphs = DecodeGraphs(self._model, self._pool, self._calls, room)
        if later:
            graphs.prepare_later(most_rows, capture)
        else:
            graphs.prepare(ladder(most_rows), capture)
        self._graphs = graphs

    @property
    def graphs(self) -> list[int]:
        """Numbers of rows that are decoded in one launch."""
        return [] if self._graphs is None else self._graphs.sizes

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Logits [R, V]: the `num_logits` last tokens of each piece, in the given order."""
        graphs = self.in_one_launch(pieces)
        logits_BV = None if graphs is None else graphs.run(pieces)
        if logits_BV is not None:
            return logits_BV
        logits_RV = self._run_packed(pieces)
        if self._graphs is not None and self._graphs.may_capture(len(pieces)) and self._in_one_launch(pieces):
            self._graphs.ask(len(pieces))
        return logits_RV

    def in_one_launch(self, pieces: Sequence[Piece]) -> DecodeGraphs | None:
        """The graphs that compute these pieces, if any do. With the next tokens of the same sequences it stays so.

        Raises ModelError for a sequence with tokens left out where a layer sees only the last ones: it counts slots.
        """
        if self._slides and any(piece.left_out for piece in pieces):
            raise ModelError("a layer with a window or chunks counts slots back: no token before one may be left out")
        fits = self._graphs is not None and self._graphs.size_of(len(pieces)) is not None
        return self._graphs if fits and self._in_one_launch(pieces) else None

    def _in_one_launch(self, pieces: Sequence[Piece]) -> bool:
        """Whether pieces are single tokens of the model itself, and gain little by reading a beginning once."""
        plain = all(len(p.tokens) == 1 and p.num_logits == 1 and p.adapter == BASE for p in pieces)
        return plain and not self._shares_much(pieces)

    def _shares_much(self, pieces: Sequence[Piece]) -> bool:
        if self._sharing is None or len(pieces) < _LEAST_SHARING_ROWS:
            return False
        group, size = self._sharing, self._pool.layout.page_tokens
        first = Counter(piece.pages[group] for piece in pieces if piece.past >= _LEAST_SHARED_PAGES * size)
        beginning, count = first.most_common(1)[0] if first else (0, 0)
        if count < _LEAST_SHARING_ROWS:
            return False
        # At most so many pages would be read less: seldom enough for a closer look.
        most = max(piece.past for piece in pieces if piece.pages[group] == beginning) // size * len(pieces)
        if most < self._least_saved_pages:
            return False
        groups = self._pool.layout.num_groups
        rows = sorted(pieces, key=lambda piece: (piece.pages[group], piece.past))
        shared = sharing_rows([list(piece.pages[group : piece.past // size * groups : groups]) for piece in rows])
        return sum((len(part) - 1) * pages for part, pages in shared) >= self._least_saved_pages

    def _run_packed(self, pieces: Sequence[Piece]) -> Tensor:
        # Single tokens first: neighbours are attended together, the longer pieces one each.
        # With states, those that continue a sequence go before those that begin one, which have no state yet.
        begins_last = self._states is not None
        order = sorted(
            range(len(pieces)),
            key=lambda i: (
                len(pieces[i].tokens) > 1,
                begins_last and pieces[i].position == 0,
                self._beginning(pieces[i]),
                pieces[i].past,
            ),
        )
        packed = [pieces[i] for i in order]
        tokens_T = torch.tensor([token for piece in packed for token in piece.tokens])
        positions_T = torch.cat([torch.arange(p.position, p.position + len(p.tokens)) for p in packed])
        keep, back = kept_rows(pieces, order)
        batch, cache = self._pack(packed), self._cache(packed)
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
            stretches.append(Stretch(start, len(piece.tokens), piece.state, fresh=piece.position == 0))
            start += len(piece.tokens)
        self._shell.states = BatchStates(self._states, stretches, stepwise=self._stepwise, window=self._lowrank.window)
        return self._shell

    def _beginning(self, piece: Piece) -> int:
        """Same for sequences that may share pages; where pages are gathered, rows of like length belong together."""
        if self._sharing is None or len(piece.tokens) > 1 or not piece.pages:
            return 0
        return piece.pages[self._sharing]

    def _pack(self, pieces: Sequence[Piece]) -> PagedBatch:
        size, device = self._pool.layout.page_tokens, self._pool.device
        tables = [np.array(piece.pages, np.int64).reshape(-1, self._pool.layout.num_groups) for piece in pieces]
        rows = [_Row(piece, table) for piece, table in zip(pieces, tables, strict=True) if len(piece.tokens) == 1]
        segments: list[Segment] = []
        used: list[np.ndarray] = []
        slots: list[np.ndarray] = []
        start = 0
        for piece, table in zip(pieces, tables, strict=True):
            length = len(piece.tokens)
            places = np.arange(piece.past, piece.past + length)
            used.append(table[places // size])
            slots.append(places % size)
            if length > 1:
                segments.append(Segment(start, length, piece.past, torch.from_numpy(table).to(device)))
            start += length
        parts = {key: [*self._decode_parts(rows, *key), *segments] for key in self._tables}
        page_TG, slot_T = (torch.from_numpy(np.concatenate(found)).to(device) for found in (used, slots))
        return PagedBatch(self._pool, self._calls, page_TG, slot_T, parts, self._tokens)

    def _decode_parts(self, rows: Sequence[_Row], rule: LayerRule, group: int) -> list[DecodeRows | Segment]:
        """Single tokens by the kernel over pages: together, those that share a beginning by themselves."""
        size, device = self._pool.layout.page_tokens, self._pool.device
        if rule.chunk is not None and rule.chunk % size:
            # Its beginnings lie within pages, where the kernel does not begin.
            return [
                Segment(start, 1, row.piece.past, torch.from_numpy(row.table_NG).to(device))
                for start, row in enumerate(rows)
            ]
        seen = [seen_pages(row.piece.past, rule, size) for row in rows]
        if (rule, group) in self._gathers:
            together = [(part, 0) for part in group_rows([len(pages) for pages in seen], self._gather_pages)]
        elif (rule, group) in self._shares:
            full = [row.table_NG[: row.piece.past // size, group].tolist() for row in rows]
            together = sharing_rows(full)
        else:
            together = [(range(len(rows)), 0)] * bool(rows)
        return [self._decode_rows(rows, seen, group, *part) for part in together]

    def _decode_rows(
        self, rows: Sequence[_Row], seen: Sequence[range], group: int, part: range, shared: int
    ) -> DecodeRows:
        """`shared`: pages that the rows of a part have in common, which lead the tables of none of them."""
        size, device = self._pool.layout.page_tokens, self._pool.device
        own = [range(seen[row].start + shared, seen[row].stop) for row in part]
        tables = np.zeros((len(own), max(map(len, own))), np.int64)
        for place, (row, pages) in enumerate(zip(part, own, strict=True)):
            tables[place, : len(pages)] = rows[row].table_NG[pages.start : pages.stop, group]
        lengths = [rows[row].piece.past + 1 - pages.start * size for row, pages in zip(part, own, strict=True)]
        # A page that is gone must not become another's by losing its upper bits.
        assert tables.max() < self._pool.num_pages, "a row sees a page that was given back"
        tables_BN = torch.from_numpy(tables.astype(np.int32)).to(device)
        lengths_B = torch.tensor(lengths, dtype=torch.int32, device=device)
        if not shared:
            return DecodeRows(part.start, tables_BN, lengths_B)
        prefix_N = torch.from_numpy(rows[part.start].table_NG[:shared, group].astype(np.int32)).to(device)
        prefix_length_1 = torch.tensor([shared * size], dtype=torch.int32, device=device)
        return DecodeRows(part.start, tables_BN, lengths_B, prefix_N, prefix_length_1)


@dataclass(frozen=True, slots=True)
class _Row:
    """A single token of a sequence, and its pages of each group by place."""

    piece: Piece
    table_NG: np.ndarray


def seen_pages(past: int, rule: LayerRule, page_tokens: int) -> range:
    """Which pages of a sequence of `past` tokens its next token sees, by their place in the sequence."""
    return range(first_visible(past, rule) // page_tokens, past // page_tokens + 1)


def sharing_rows(full_pages: Sequence[Sequence[int]]) -> list[tuple[range, int]]:
    """Neighbours that begin with the same pages, and how many those are; all other neighbours share 0.

    `full_pages`: of each row the pages that it does not write any more. Few pages or rows are not worth a second call.
    """
    groups: list[tuple[range, int]] = []
    start = 0
    while start < len(full_pages):
        end, shared = start + 1, len(full_pages[start])
        while end < len(full_pages):
            common = _common(full_pages[start], full_pages[end], shared)
            too_many = (end + 1 - start) * common > _MOST_SHARED_ENTRIES
            if common < max(_LEAST_SHARED_PAGES, shared // 2) or too_many:
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


def _common(a: Sequence[int], b: Sequence[int], most: int) -> int:
    """How many of the first `most` pages are the same."""
    most = min(most, len(b))
    if a[:most] == b[:most]:
        return most
    return next(i for i in range(most) if a[i] != b[i])


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
