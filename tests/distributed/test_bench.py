"""`farspan bench parallel` on a case small enough for a test."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tests.support.ranks import RankPool

from farspan.errors import ClusterError
from farspan.parallel.bench import bench_parallel
from farspan.parallel.contenders import ONE_PROCESS, PEER, BenchCase
from farspan.parallel.strategy import STRATEGIES
from farspan.parallel.wire import WireBytes


@pytest.mark.long
def test_every_strategy_and_the_peer_stand_beside_one_process_with_the_bytes_of_their_formula() -> None:
    rows = bench_parallel((BenchCase((0, 64), 4, 2, 16), BenchCase((0, 5, 64), 4, 2, 16)), rounds=1)
    assert [row["strategy"] for row in rows] == [ONE_PROCESS, *STRATEGIES, PEER] * 2
    measured = [row for row in rows if "not_measured" not in row]
    assert [row["strategy"] for row in measured][:7] == [ONE_PROCESS, *STRATEGIES, PEER]
    assert "they would attend to each other" in rows[-1]["not_measured"]
    for row in measured:
        assert row["seconds"] > 0
        assert row["worst_error"] < 1e-5
        if row["strategy"] != ONE_PROCESS:
            assert row["bytes_sent"] == row["bytes_formula"] > 0


def sent_by_plain_calls() -> tuple[int, int]:
    """(bytes, calls) counted of one all-to-all of fp64 numbers, and of a barrier beside it."""
    num_ranks = dist.get_world_size()
    with WireBytes(num_ranks) as wire:
        rows = torch.ones(num_ranks, 5, dtype=torch.float64)
        dist.all_to_all_single(torch.empty_like(rows), rows)
        dist.barrier()
    return wire.bytes_sent, wire.num_calls


def test_bytes_on_the_wire_are_those_of_other_ranks_parts(ranks: RankPool) -> None:
    assert ranks.run(sent_by_plain_calls, 2) == [(5 * 8, 1)] * 2


def sends_otherwise() -> None:
    with WireBytes(dist.get_world_size()):
        dist.all_reduce(torch.ones(1))


def test_another_collective_is_not_passed_over_in_silence(ranks: RankPool) -> None:
    with pytest.raises(Exception, match=r"counted of all-to-all alone, and c10d\.allreduce_"):
        ranks.run(sends_otherwise, 2)


def test_a_process_that_fails_ends_the_bench_with_its_reason() -> None:
    with pytest.raises(ClusterError, match=r"rank \d: ValueError: contiguous layout needs num_tokens divisible"):
        bench_parallel((BenchCase((0, 63), 4, 2, 16),), rounds=1)
