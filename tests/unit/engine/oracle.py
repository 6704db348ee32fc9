"""What transformers itself says about a prompt, for tests of the engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from farspan.engine.engine import Engine
from farspan.engine.probe import attention_of, set_attention
from farspan.engine.runner import Piece

# Where transformers' fused attention leaves out a soft cap or sinks.
EAGER = frozenset({"gemma2", "gpt_oss", "vaultgemma", "granite_swa", "granitemoe_swa", "mimo_v2_flash"})


def whole_logits(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """Logits [T, V] of one plain forward over all tokens, without any cache."""
    before = attention_of(model)
    eager = model.config.model_type in EAGER or not model._supports_sdpa
    set_attention(model, "eager" if eager else "sdpa")
    try:
        with torch.inference_mode():
            logits: Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    finally:
        set_attention(model, before)
    return logits


def chunked_logits(
    engine: Engine, rows: list[list[int]], chunk: int, adapters: Sequence[str] = ()
) -> list[tuple[int, int, Tensor]]:
    """(row, position, logits) of every piece computed: the first row in chunks, the others a token at a time.

    So that sequences that begin, go on in chunks and go on by one token meet in one batch. `adapters`: of each row.
    """
    pages = [engine.pool.alloc(engine.pool.layout.num_pages(len(row))) or [] for row in rows]
    found: list[tuple[int, int, Tensor]] = []
    done = [0] * len(rows)
    # A beginning of several tokens for the last row: then it has a past while the others begin.
    sizes = [chunk, *(1 for _ in rows[1:])]
    while any(count < len(row) for count, row in zip(done, rows, strict=True)):
        todo = [i for i, row in enumerate(rows) if done[i] < len(row)]
        pieces = []
        for i in todo:
            size = 5 if i == len(rows) - 1 and done[i] == 0 else sizes[i]
            state = engine.states.hold(f"row {i}") if engine.states else None
            adapter = adapters[i] if adapters else ""
            pieces.append(Piece(rows[i][done[i] : done[i] + size], done[i], pages[i], state, adapter=adapter))
        for i, piece, logits_V in zip(todo, pieces, engine.adapters.run(engine._runner, pieces), strict=True):
            done[i] += len(piece.tokens)
            found.append((i, done[i] - 1, logits_V))
    for i, held in enumerate(pages):
        engine.pool.free(held)
        if engine.states:
            engine.states.release(f"row {i}")
    return found
