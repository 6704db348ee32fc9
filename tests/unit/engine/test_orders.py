"""What a leader tells is read by the other ranks as it was meant, whatever it holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from farspan.engine.orders import (
    Fetch,
    read_changes,
    read_fetch,
    read_pieces,
    read_sources,
    write_changes,
    write_fetch,
    write_pieces,
    write_sources,
)
from farspan.engine.runner import Piece
from farspan.kv.layout import GONE
from farspan.kv.ticket import SourceAddress

numbers = st.integers(0, 2**40)
pieces = st.builds(
    lambda tokens, past, pages, logits, left_out: Piece(
        tokens, past, pages, num_logits=min(logits, len(tokens)), left_out=left_out
    ),
    st.lists(numbers, min_size=1, max_size=9),
    numbers,
    st.lists(numbers | st.just(GONE), max_size=9),
    st.integers(1, 9),
    numbers,
)
sources = st.builds(
    SourceAddress, st.text(max_size=9), st.text(max_size=9), st.binary(max_size=40), numbers, numbers, numbers
)


@given(st.lists(st.tuples(numbers, st.integers(-1, 2**40)), max_size=5), st.lists(pieces, max_size=5))
def test_changes_and_pieces_are_read_as_they_were_written(changes, told):
    read_changed, body = read_changes(write_changes(changes, write_pieces(told)))
    assert read_changed == changes
    assert [(list(p.tokens), p.past, list(p.pages), p.num_logits, p.left_out) for p in read_pieces(body)] == [
        (p.tokens, p.past, p.pages, p.num_logits, p.left_out) for p in told
    ]


@given(numbers, st.lists(sources, max_size=3), st.lists(st.tuples(numbers, numbers), max_size=5))
def test_a_fetch_is_read_as_it_was_written(number, told, pages):
    fetch = Fetch(number, told, [there for there, _ in pages], [here for _, here in pages])
    assert read_fetch(write_fetch(fetch)) == fetch


@given(sources, st.integers(0, 9))
def test_an_address_is_read_whatever_stands_behind_it(source, num_behind):
    # Ranks of ranks there are none.
    told = write_sources([replace(source, ranks=(source,))])
    assert read_sources(np.concatenate([told, np.ones(num_behind, np.int64)])) == [source]
