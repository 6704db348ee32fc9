"""The bench of transfers measures two real processes, and sees when what they answer is wrong."""

from __future__ import annotations

import pytest

from farspan.serve.bench_transfer import BARE, MEANWHILE, OURS, TransferBench, _row, _Turn, bench_transfer

pytest.importorskip("nixl")
TINY = TransferBench(
    settings={
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
    },
    dtype="float32",
    num_tokens=600,
    max_batch_tokens=128,
    turns=1,
    copies=2,
    threads=1,
    kv_bytes=16 << 20,
)


@pytest.mark.long
def test_pages_fetched_meanwhile_are_most_of_them_and_the_answers_are_right():
    rows = bench_transfer(TINY)
    assert [row for row in rows if "wrong" in row] == []
    meanwhile, afterwards, bare, ours = rows
    # Four whole parts of 128 tokens; the fifth, of 88, comes with the ticket.
    assert meanwhile["pages fetched early"] == pytest.approx(512 / 16 / 38)
    assert afterwards["pages fetched early"] == 0
    assert meanwhile["kv_bytes"] == 38 * 16 * 2 * 2 * 2 * 16 * 4
    assert 0 < meanwhile["exposed_s"] < 10 * meanwhile["prefill_s"]
    assert (bare["contender"], ours["contender"]) == (BARE, OURS)
    assert ours["farspan / bare"] > 0
    assert {"goal"} <= meanwhile.keys() & ours.keys()


def test_an_answer_that_is_not_the_models_has_no_speed():
    right, wrong = (_Turn(1.0, 0.1, 100, 0.5, is_right) for is_right in (True, False))
    assert "wrong" not in _row(TINY, MEANWHILE, [right, right])
    assert "wrong" in _row(TINY, MEANWHILE, [right, wrong])
