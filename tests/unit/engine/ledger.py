"""A runner that computes nothing: it writes tokens into pages, and the next token is a function of what it reads there.

An engine on it answers right only if every page of every sequence holds what the sequence computed. A layer with a
window must hold the same as the layer that keeps everything, as far as the window reaches.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence

import torch
from tests.unit.engine.tiny import VOCAB, engine_config, tiny_model
from torch import Tensor

from farspan.engine.draft import Drafter
from farspan.engine.engine import Engine
from farspan.engine.runner import Piece
from farspan.engine.staged import Room, StagedRows
from farspan.kv.pages import PagePool
from farspan.models.rules import LayerRule


def next_token(history: Sequence[int]) -> int:
    return zlib.crc32(array("q", history).tobytes()) % VOCAB


def answer(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What an engine on a ledger must say."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Ledger:
    """Takes the place of an engine's runner."""

    def __init__(self, pool: PagePool, clock: Clock) -> None:
        self._pool, self._clock = pool, clock
        self._layers_PS = [pool.keys_PSGD(layer)[:, :, 0, 0] for layer in range(pool.layout.num_layers)]
        self.num_tokens = 0
        self.most_holders = 1
        """Of a page that is written."""
        self.steps: LedgerSteps | None = None
        """What decodes in one launch."""

    def in_one_launch(self, pieces: Sequence[Piece]) -> LedgerSteps | None:
        single = all(len(piece.tokens) == 1 for piece in pieces)
        return self.steps if self.steps is not None and single and self.steps.size_of(len(pieces)) else None

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        choices: list[int] = []
        for piece in pieces:
            history = self.compute(piece)
            ends = range(len(history) - piece.num_logits + 1, len(history) + 1)
            choices += [next_token(history[:end]) for end in ends]
        return torch.nn.functional.one_hot(torch.tensor(choices), VOCAB).double()

    def compute(self, piece: Piece) -> list[int]:
        """The tokens of a sequence up to the last of a piece, which are in its pages then."""
        found = [self._compute_layer(layer, piece) for layer in range(len(self._layers_PS))]
        history = max(found, key=len)
        assert len(history) == piece.past + len(piece.tokens), "no layer keeps everything"
        assert all(seen == history[len(history) - len(seen) :] for seen in found), (
            "a window does not hold what it should"
        )
        self.num_tokens += len(piece.tokens)
        self._clock.now_s += 1e-4 * len(piece.tokens)
        return history

    def _compute_layer(self, layer: int, piece: Piece) -> list[int]:
        """The tokens that the new ones see, and they themselves, as the pages of a layer hold them."""
        layout, slots_PS = self._pool.layout, self._layers_PS[layer]
        size, group = layout.page_tokens, layout.group_of(layer)
        first, end = layout.groups[group].reach.first(piece.past), piece.past + len(piece.tokens)
        pages = list(piece.pages[group :: layout.num_groups])
        written = set(pages[piece.past // size : layout.num_places(end)])
        assert all(1 <= self._pool.holders(page) <= self.most_holders for page in written), (
            "a page that others hold was written"
        )
        start = first - first % size
        seen = pages[start // size :]
        history_S = slots_PS[seen].flatten()
        history_S[piece.past - start : end - start] = torch.tensor(piece.tokens, dtype=torch.float64)
        slots_PS[seen] = history_S.view(-1, size)
        return [int(token) for token in history_S[first - start : end - start].tolist()]


class LedgerSteps:
    """Takes the place of the graphs of decode: what is staged is all that a step is computed from."""

    sizes = (1, 2, 4, 8)

    def __init__(self, ledger: Ledger, pool: PagePool, most_tokens: int) -> None:
        layout = pool.layout
        room = Room(self.sizes[-1], layout.num_places(most_tokens), layout.page_tokens, 1, pool.num_pages)
        self._ledger, self._key, self._page_tokens = ledger, (LayerRule(), 0), layout.page_tokens
        self.staged = StagedRows(room, [self._key], pool.device)
        self.logits_RV = torch.zeros(self.sizes[-1], VOCAB, dtype=torch.float64)
        self.num_launched = 0

    def size_of(self, num_rows: int) -> int | None:
        return next((size for size in self.sizes if size >= num_rows), None)

    def launch(self, size: int) -> bool:
        (rows,) = self.staged.parts(size)[self._key]
        for row, token in enumerate(self.staged.tokens_B(size).tolist()):
            past = int(rows.lengths_B[row]) - 1
            pages = rows.tables_BN[row, : past // self._page_tokens + 1].tolist()
            choice = next_token(self._ledger.compute(Piece([token], past, pages)))
            self.logits_RV[row] = torch.nn.functional.one_hot(torch.tensor(choice), VOCAB)
        self.num_launched += 1
        return True


def ledger_engine(
    num_pages: int,
    clock: Clock | None = None,
    *,
    drafter: Drafter | None = None,
    window: int | None = None,
    steps: str = "",
    **settings: object,
) -> tuple[Engine, Ledger]:
    """An engine on a ledger with so many pages. `window`: two layers have it, beside one that keeps everything.

    `steps`: "in one launch", or also "ahead" of what was looked at.
    """
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    windowed = {"num_hidden_layers": 3, "layer_types": kinds, "sliding_window": window}
    model = tiny_model("gemma3_text", **windowed) if window else tiny_model(num_hidden_layers=1)
    page_tokens = int(str(settings.get("page_tokens", 4)))
    page_bytes = page_tokens * 2 * (8 + 8) * 8
    clock = clock or Clock()
    config = engine_config(kv_bytes=num_pages * page_bytes, **settings)
    engine = Engine(model, config, clock=clock, drafter=drafter, ahead=steps == "ahead")
    assert engine.pool.num_pages == num_pages
    assert engine._steady is not None
    ledger = Ledger(engine.pool, clock)
    engine._runner = engine._steady._runner = ledger  # type: ignore[assignment]
    if steps:
        ledger.steps = LedgerSteps(ledger, engine.pool, 2 * num_pages * page_tokens)
        # The sequence, and each of two steps on their way.
        ledger.most_holders = 3 if steps == "ahead" else 1
    return engine, ledger
