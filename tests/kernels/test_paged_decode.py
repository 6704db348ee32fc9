"""Attention over pages: the reference against torch's own attention, its cousins against the reference."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.paged_cases import CASES, Case, assert_close, make
from torch.nn.functional import scaled_dot_product_attention

from farspan.kernels.attention.limits import Ask, decide
from farspan.kernels.attention.reference import attend_reference
from farspan.kernels.merge.sink import merge_sinks
from farspan.kernels.paged_decode import bench, dispatch
from farspan.kernels.paged_decode.dispatch import choose_pages_backend
from farspan.kernels.paged_decode.gathered import attend_pages_gathered
from farspan.kernels.paged_decode.limits import BACKENDS
from farspan.kernels.paged_decode.partition import Piece, cut_line, owner, places, share, tiles_of
from farspan.kernels.paged_decode.reference import attend_pages_reference, seen
from farspan.kernels.paged_decode.shared import attend_after_prefix, attend_shared_prefix, split_prefix

ASK = Ask("cpu", torch.bfloat16, 64, 64)
TILES = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@pytest.mark.parametrize("case", [case for case in CASES if case.softcap is None], ids=str)
def test_the_reference_over_pages_equals_torchs_attention_over_the_tokens_of_each_row(case) -> None:
    (q, keys, values, tables, lengths), rule = make(case, "cpu", torch.float64)
    out, lse = attend_pages_reference(q, keys, values, tables, lengths, **rule)
    for row, length in enumerate(case.lengths):
        if length == 0:
            assert not out[row].any()
            assert bool(lse[row].isneginf().all())
            continue
        pages = tables[row, : -(-length // case.slots)]
        k, v = (x[pages].flatten(0, 1)[:length].nan_to_num(0.0).transpose(0, 1) for x in (keys, values))
        visible = seen(lengths[row : row + 1], case.queries, length, case.causal, case.window)[0]
        bias = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, float("-inf"))
        bias = bias.expand(case.heads, -1, -1)
        if case.weighted:
            weights = rule["log_weights_PSG"][pages].flatten(0, 1)[:length].double().nan_to_num(0.0, neginf=-torch.inf)
            bias = bias + weights.T.repeat_interleave(case.heads // case.groups, 0).unsqueeze(1)
        some = ~bias.isneginf().all(-1).T
        query = q[row].transpose(0, 1)
        want = scaled_dot_product_attention(
            query[None], k[None], v[None], attn_mask=bias[None], scale=0.3, enable_gqa=True
        )[0].transpose(0, 1)
        assert bool(some.any())
        assert torch.allclose(out[row][some], want[some], atol=1e-12)
        scores = query @ k.repeat_interleave(case.heads // case.groups, 0).transpose(1, 2) * 0.3 + bias
        assert torch.allclose(lse[row], scores.logsumexp(-1).T, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gathered_pages_equal_the_reference_and_hidden_slots_never_matter(case, dtype) -> None:
    inputs, rule = make(case, "cpu", dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert_close(tolerance, attend_pages_gathered(*inputs, **rule), attend_pages_reference(*inputs, **rule))


def test_a_slot_with_log_weight_n_counts_as_n_equal_tokens() -> None:
    """Four equal tokens, and one of them with weight log 4: the same softmax."""
    (q, keys, values, tables, lengths), rule = make(Case((20,), slots=4), "cpu", torch.float64)
    page = tables[0, 4]
    keys[page], values[page] = keys[page, :1].clone(), values[page, :1].clone()
    want = attend_pages_reference(q, keys, values, tables, lengths, **rule)
    weights = torch.zeros(keys.shape[:3])
    weights[page] = torch.tensor(4.0).log()
    merged = attend_pages_reference(q, keys, values, tables, lengths - 3, **rule | {"log_weights_PSG": weights})
    assert_close(1e-7, merged, want)


def test_sinks_merged_into_the_result_equal_one_softmax_with_them() -> None:
    inputs, rule = make(Case((20, 5)), "cpu", torch.float64)
    out, lse = attend_pages_reference(*inputs, **rule)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    got, _ = merge_sinks(out[:, 0], lse[:, 0], sinks)
    q, keys, values, tables, _ = inputs
    for row, length in enumerate((20, 5)):
        k, v = (
            x[tables[row, : -(-length // 16)]].flatten(0, 1)[:length].repeat_interleave(2, 1) for x in (keys, values)
        )
        scores = torch.einsum("hd,thd->ht", q[row, 0], k) * 0.3
        probs = torch.cat([scores, sinks[:, None]], 1).softmax(-1)[:, :length]
        assert torch.allclose(got[row], torch.einsum("ht,thc->hc", probs, v), atol=1e-12)


@pytest.mark.parametrize("attend", [attend_pages_reference, attend_pages_gathered])
@pytest.mark.parametrize("queries", [1, 3])
def test_a_prefix_read_once_for_all_rows_equals_each_row_over_its_whole_context(attend, queries) -> None:
    case = Case((70, 53, 49), queries=queries, slots=8, weighted=True)
    (q, keys, values, tables, lengths), rule = make(case, "cpu", torch.float64)
    tables[:, :5] = tables[0, :5]
    rule = {"scale": 0.3, "log_weights_PSG": rule["log_weights_PSG"]}
    want = attend_pages_reference(q, keys, values, tables, lengths, **rule)
    got = attend_shared_prefix(attend, q, keys, values, *split_prefix(tables, lengths, 5, 8), **rule)
    assert_close(1e-12, got, want)


def test_a_shared_prefix_is_asked_for_once_per_batch() -> None:
    (q, keys, values, tables, lengths), _ = make(Case((70, 53, 49), slots=8), "cpu", torch.float64)
    asked = []

    def attend(q, keys, values, tables, lengths, **rule):
        asked.append((tuple(q.shape[:2]), tuple(tables.shape), lengths.tolist()))
        return attend_pages_reference(q, keys, values, tables, lengths, **rule)

    attend_shared_prefix(attend, q, keys, values, *split_prefix(tables, lengths, 5, 8), scale=0.3)
    assert asked == [((1, 3), (1, 5), [40]), ((3, 1), (3, 5), [30, 13, 9])]


@pytest.mark.parametrize("window", [None, 1, 9, 30, 100])
@pytest.mark.parametrize("prefix", [0, 1, 16, 45])
def test_prefill_after_cached_pages_equals_attention_over_the_whole(prefix, window) -> None:
    tokens, softcap = 20, 2.0
    case = Case((prefix + tokens,), queries=tokens, slots=8, softcap=softcap, window=window)
    (q, keys, values, tables, lengths), rule = make(case, "cpu", torch.float64)
    want = attend_pages_reference(q, keys, values, tables, lengths, **rule)
    used = tables[0][: -(-(prefix + tokens) // 8)]
    k, v = (x[used].flatten(0, 1)[prefix : prefix + tokens] for x in (keys, values))
    band = {"scale": 0.3, "window": window, "softcap": softcap}
    out, lse = attend_after_prefix(attend_reference, q[0], k, v, keys, values, used, prefix, **band)
    assert_close(1e-12, (out.unsqueeze(0), lse.unsqueeze(0)), want)


@given(TILES, st.integers(1, 30))
def test_every_tile_is_computed_once_and_no_program_gets_two_tiles_more_than_another(tiles, num_programs) -> None:
    pieces = cut_line(tiles, num_programs)
    for segment, count in enumerate(tiles):
        mine = [piece for piece in pieces if piece.segment == segment]
        assert [tile for piece in mine for tile in range(piece.first, piece.stop)] == list(range(count))
    loads = [sum(p.stop - p.first for p in pieces if p.program == program) for program in range(num_programs)]
    assert max(loads) - min(loads) <= 1
    assert loads == [len(share(sum(tiles), num_programs, program)) for program in range(num_programs)]


@given(TILES, st.integers(1, 30))
def test_no_two_pieces_share_a_place_and_a_segment_finds_all_of_its_own(tiles, num_programs) -> None:
    pieces = cut_line(tiles, num_programs)
    assert len({piece.place for piece in pieces}) == len(pieces)
    assert all(piece.place < num_programs + len(tiles) for piece in pieces)
    for segment in range(len(tiles)):
        assert list(places(tiles, num_programs, segment)) == [p.place for p in pieces if p.segment == segment]


@given(st.integers(1, 2000), st.integers(1, 600), st.data())
def test_the_owner_of_a_tile_is_the_program_whose_share_holds_it(total, num_programs, data) -> None:
    tile = data.draw(st.integers(0, total - 1))
    assert tile in share(total, num_programs, owner(tile, total, num_programs))


@given(st.integers(0, 300), st.integers(1, 70), st.integers(1, 9), st.none() | st.integers(1, 80))
@settings(max_examples=200)
def test_the_tiles_of_a_row_are_those_with_a_token_that_some_query_sees(length, tokens, queries, window) -> None:
    tiles = tiles_of(length, tokens, queries, window)
    anyone = seen(torch.tensor([length]), queries, length, True, window)[0].any(0)
    touched = {int(token) // tokens for token in anyone.nonzero().flatten()}
    # Tiles are one range: also those between two windows would be in it, but windows of neighbours overlap or touch.
    assert set(tiles) == touched


def test_a_program_may_end_one_row_and_begin_the_next() -> None:
    assert cut_line([3, 0, 5], 2) == [Piece(0, 0, 0, 3), Piece(0, 2, 0, 1), Piece(1, 2, 1, 5)]


def test_pages_that_contradict_the_queries_are_refused() -> None:
    (q, keys, values, tables, lengths), rule = make(Case((5,)), "cpu", torch.float32)
    attend = partial(attend_pages_reference, q, **rule)
    for wrong in (
        (keys[..., :8], values, tables, lengths),
        (keys, values, tables.float(), lengths),
        (keys, values, tables, lengths.repeat(2)),
    ):
        with pytest.raises(AssertionError):
            attend(*wrong)


def test_a_case_goes_to_the_first_backend_that_computes_it_and_the_others_say_why_not() -> None:
    assert decide(Ask("cuda", torch.bfloat16, 64, 64), {}, BACKENDS).name == "triton"
    assert decide(ASK, {}, BACKENDS).name == "native"
    for ask in (
        Ask("cpu", torch.float64, 64, 64),
        Ask("cpu", torch.float16, 64, 64),
        Ask("cpu", torch.float32, 576, 512),
    ):
        decision = decide(ask, {}, BACKENDS)
        assert decision.name == "gathered"
        assert dict(decision.passed_over)["native"]
    assert decide(Ask("mps", torch.float32, 64, 64), {}, BACKENDS).name == "reference"


def test_a_machine_that_cannot_compile_gathers_and_logs_the_reason(monkeypatch, caplog) -> None:
    def broken():
        raise ImportError("no C++ compiler is installed")

    monkeypatch.setattr(dispatch, "_LOADERS", {**dispatch._LOADERS, "native": broken})
    with caplog.at_level("INFO"):
        assert choose_pages_backend.__wrapped__(ASK) is attend_pages_gathered
    assert "no C++ compiler is installed" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="the cases are a CPU's")
def test_the_bench_measures_every_contestant_beside_its_peer_and_gives_a_wrong_one_no_time() -> None:
    def drops_the_last_token(q, keys, values, tables, lengths, **rule):
        return attend_pages_reference(q, keys, values, tables, lengths - 1, **rule)

    case = bench.Case(3, 40, torch.float32, 4, 2, 16, ragged=True)
    backends = {"reference": attend_pages_reference, "wrong": drops_the_last_token}
    right, wrong, peer = bench.bench_paged_decode((case,), backends)
    assert [row["contestant"] for row in (right, wrong, peer)] == [
        "farspan reference",
        "farspan wrong",
        "gather + sdpa",
    ]
    for row in (right, peer):
        assert min(row[name] for name in ("seconds", "bytes_per_second", "of_copy", "ratio")) > 0
    assert "seconds" not in wrong
    assert wrong["wrong"].startswith("differs by")
