"""The band cut into pieces: every visible pair once, and few pieces."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan.kernels.attention.pieces import Kind, Piece, cut_band


def seen(num_queries: int, num_keys: int, offset: int | None, window: int | None) -> set[tuple[int, int]]:
    """The contract's rule, written out."""
    return {
        (t, s)
        for t in range(num_queries)
        for s in range(num_keys)
        if offset is None or (s <= t + offset and (window is None or s > t + offset - window))
    }


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(-50, 50), st.none() | st.integers(1, 60))
def test_pieces_hold_every_visible_pair_exactly_once(num_queries, num_keys, offset, window) -> None:
    pieces = cut_band(num_queries, num_keys, offset, window)
    counts = Counter(pair for piece in pieces for pair in piece.pairs())
    assert set(counts) == seen(num_queries, num_keys, offset, window)
    assert set(counts.values()) <= {1}


@given(st.integers(0, 10), st.integers(0, 10))
def test_a_pair_without_an_offset_is_one_rectangle(num_queries, num_keys) -> None:
    counts = Counter(pair for piece in cut_band(num_queries, num_keys, None, None) for pair in piece.pairs())
    assert set(counts) == seen(num_queries, num_keys, None, None)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 10**7), st.integers(1, 10**7), st.integers(-(10**7), 10**7), st.none() | st.integers(1, 10**7))
def test_ten_million_tokens_are_still_a_handful_of_pieces_whose_shapes_the_kernel_knows(
    num_queries, num_keys, offset, window
) -> None:
    pieces = cut_band(num_queries, num_keys, offset, window)
    assert len(pieces) <= 8
    for piece in pieces:
        assert piece.num_queries > 0
        assert piece.num_keys > 0
        if piece.kind is Kind.CAUSAL:
            assert piece.num_keys <= piece.num_queries
        if piece.kind is Kind.FLIPPED:
            assert piece.num_keys == piece.num_queries
        last = (piece.repeat - 1) * piece.step
        assert 0 <= piece.query <= piece.query + piece.num_queries + last <= num_queries
        assert 0 <= piece.key <= piece.key + piece.num_keys + last <= num_keys
        # Blocks of a batch do not overlap: sums into them are taken once per row.
        assert piece.repeat == 1 or piece.step >= max(piece.num_queries, piece.num_keys)


@pytest.mark.parametrize(
    ("pair", "pieces"),
    [
        ((8192, 8192, 0, None), [Piece(Kind.CAUSAL, 0, 8192, 0, 8192)]),
        ((8192, 8192, 0, 9000), [Piece(Kind.CAUSAL, 0, 8192, 0, 8192)]),
        ((64, 96, 32, None), [Piece(Kind.CAUSAL, 0, 64, 32, 64), Piece(Kind.FULL, 0, 64, 0, 32)]),
        (
            (8192, 8192, 0, 1024),
            [
                Piece(Kind.CAUSAL, 0, 1024, 0, 1024, repeat=8, step=1024),
                Piece(Kind.FLIPPED, 1024, 1023, 1, 1023, repeat=7, step=1024),
            ],
        ),
        ((4096, 4096, 4096, 4096), [Piece(Kind.FLIPPED, 0, 4095, 1, 4095)]),
    ],
)
def test_common_pairs_are_as_few_pieces_as_their_picture_has(pair, pieces) -> None:
    assert cut_band(*pair) == pieces
