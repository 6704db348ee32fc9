"""Ranks on different hosts find each other whatever their hosts' own names mean, and learn what one process learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.corpus import small_corpus
from tests.support.hosted_run import STEPS, curve_here, sent_bytes
from tests.support.hosts import hosts
from tests.support.ranks import RankPool
from tests.support.ray_hosts import RayHosts, shared_folder
from tests.support.runs import tiny_run

from farspan.config.load import dump_config


@pytest.mark.parametrize("strategy", ["ring", pytest.param("ulysses", marks=pytest.mark.soak)])
def test_a_sequence_shared_by_two_hosts_is_learnt_as_by_one_process(
    ranks: RankPool, tmp_path: Path, strategy: str
) -> None:
    with shared_folder() as folder, hosts(2, own_name_is_loopback=True) as made:
        corpus, results, job = small_corpus(folder), folder / "results", folder / "job"
        two = ["parallel.workers=2", "parallel.sp=2", f"parallel.strategy={strategy}", f"train.steps={STEPS}"]
        config = tiny_run(corpus, str(folder / "run"), *two)
        addresses = [host.address for host in made]
        given = {"config": dump_config(config), "addresses": addresses, "steps": STEPS, "results": str(results)}
        job.write_text(json.dumps(given), encoding="utf-8")
        before = [host.received_bytes() for host in made]
        there = RayHosts(made, folder)
        words = ("-m", "tests.support.host_rank", str(job))
        started = [there.python(rank, *words, str(rank), log=f"rank{rank}.log") for rank in range(2)]
        alone = tiny_run(corpus, str(tmp_path / "alone"), f"train.steps={STEPS}")
        (want,) = ranks.run(curve_here, 1, alone, str(tmp_path / "cache"), STEPS)
        for process in started:
            code, text = process.end()
            assert code == 0, text
        received = [host.received_bytes() - was for host, was in zip(made, before, strict=True)]
        found = {step: (loss, samples) for step, loss, samples in json.loads(results.read_text(encoding="utf-8"))}
    assert list(found) == list(want) == list(range(1, STEPS + 1))
    assert [samples for _, samples in found.values()] == [samples for _, samples in want.values()]
    # Summed in another order, in float64.
    assert [loss for loss, _ in found.values()] == pytest.approx([loss for loss, _ in want.values()], rel=1e-10)
    assert min(received) > sent_bytes(config) > 0
