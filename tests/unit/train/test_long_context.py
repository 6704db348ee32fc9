"""The contenders of the long-context bench compute the same step; only then do their lengths compare."""

from __future__ import annotations

import pytest
import torch
from tests.support.relative import relative_error

from farspan.train import long_context
from farspan.train.long_context import OURS, PEERS, PLAIN, Shape, contender

SHAPE = Shape(width=32, layers=2, q_heads=4, kv_heads=1, vocab_size=300, threads=1)


def stepped(name: str, num_tokens: int) -> tuple[float, dict[str, torch.Tensor]]:
    model = long_context._model(SHAPE, num_tokens)
    loss = contender(name, model)(long_context._document(num_tokens, SHAPE))
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [name for name in (*PEERS, *OURS) if name != PLAIN])
def test_every_contender_computes_the_gradients_of_plain_transformers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several tiles and several chunks, the last ones ragged.
    monkeypatch.setattr(long_context, "_TILE_TOKENS", 48)
    monkeypatch.setattr(long_context, "_CHUNK_TOKENS", 96)
    loss, gradients = stepped(name, 250)
    want, wanted = stepped(PLAIN, 250)
    assert loss == pytest.approx(want, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    for weight, gradient in wanted.items():
        assert relative_error(gradients[weight], gradient) < 1e-4, weight


def test_the_search_finds_the_longest_length_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def measure(name: str, shape: Shape, num_tokens: int, budget: int) -> long_context.Measured:
        asked.append(num_tokens)
        return long_context.Measured(num_tokens if num_tokens < 30000 else None, seconds=1.0)

    monkeypatch.setattr(long_context, "measure", measure)
    for limit in (700, 5000, 20000):
        tokens, measured = long_context._longest(PLAIN, SHAPE, limit, 256, 65536)
        assert limit * 0.85 < tokens <= limit
        assert measured.peak_bytes == tokens
    assert len(asked) < 50
    assert long_context._longest(PLAIN, SHAPE, 1 << 40, 256, 16384)[0] == 16384
