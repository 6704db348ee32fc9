"""`farspan bench parallel` on a case small enough for a test."""

from __future__ import annotations

import pytest

from farspan.errors import ClusterError
from farspan.parallel.bench import bench_parallel
from farspan.parallel.contenders import ONE_PROCESS, PEER, BenchCase
from farspan.parallel.strategy import STRATEGIES


def test_every_strategy_and_the_peer_stand_beside_one_process_with_the_bytes_of_their_formula() -> None:
    rows = bench_parallel((BenchCase((0, 64), 4, 2, 16), BenchCase((0, 5, 64), 4, 2, 16)), rounds=1)
    assert [row["strategy"] for row in rows] == [ONE_PROCESS, *STRATEGIES, PEER] * 2
    measured = [row for row in rows if "not_measured" not in row]
    assert [row["strategy"] for row in measured][:7] == [ONE_PROCESS, *STRATEGIES, PEER]
    assert "they would attend to each other" in rows[-1]["not_measured"]
    for row in measured:
        assert row["seconds"] > 0
        assert row["worst_error"] < 1e-5
        if row["strategy"] in STRATEGIES:
            assert row["bytes_sent"] == row["bytes_formula"] > 0


def test_a_process_that_fails_ends_the_bench_with_its_reason() -> None:
    with pytest.raises(ClusterError, match=r"rank \d: ValueError: contiguous layout needs num_tokens divisible"):
        bench_parallel((BenchCase((0, 63), 4, 2, 16),), rounds=1)
