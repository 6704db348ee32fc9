"""A run's real buffers lie where the placement policy said, and that changes no bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.corpus import small_corpus
from tests.support.ranks import RankPool
from tests.support.runs import tiny_run
from tests.support.whole import whole_of
from torch import Tensor

from farspan.config.schema import RunConfig
from farspan.plan.tiers import ACTIVATIONS, OPTIMIZER
from farspan.train.build import build
from farspan.train.tiers import FILE

CPU = torch.device("cpu")
RANKS = ["parallel.workers=2", "parallel.sp=2", "parallel.strategy=ring", "train.accumulation=2"]
AWAY = ["memory.offload_activations=auto", "weights.offload_optimizer=cpu"]
TWO_CXL = "memory.tiers=['cxl:emulated:64MiB','cxl:emulated:64MiB','dram:64MiB']"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_corpus(tmp_path_factory.mktemp("tiers"))


def a_run(corpus: str, output: Path, *options: str) -> RunConfig:
    """512 tokens of 32 in fp64 on two ranks: what a layer keeps is worth moving."""
    return tiny_run(corpus, str(output), "data.sequence_tokens=512", *RANKS, *options, num_hidden_layers=4)


def stepped(config: RunConfig, cache: str) -> dict[str, Any]:
    """Weights after two steps, what the first pass's gradients were, and who held what in which tier."""
    step = build(config, CPU, Path(cache)).step
    for number in range(2):
        step.run(number)
    found: dict[str, Any] = {"weights": {n: whole_of(p).detach().clone() for n, p in step.loss.named_parameters()}}
    tiers = step.tiers
    if tiers is not None:
        found["activations"] = [tier.stats().owners for tier in tiers.of(ACTIVATIONS).tiers]
        found["optimizer"] = None if tiers.optimizer is None else tiers.optimizer.stats()
        found["given"] = {name: (one.kind.nbytes, one.shares) for name, one in tiers.given.items()}
        found["notes"] = tiers.notes
    step.close()
    return found


def gradients(config: RunConfig, cache: str) -> dict[str, Tensor]:
    step = build(config, CPU, Path(cache)).step
    step.backward()
    found = {n: whole_of(p.grad) for n, p in step.loss.named_parameters()}
    if step.tiers is not None:
        assert [tier.kind for tier in step.tiers.of(ACTIVATIONS).tiers] == ["cxl", "dram"]
        assert all(tier.stats().owners.keys() == {"activations"} for tier in step.tiers.of(ACTIVATIONS).tiers)
    step.close()
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_optimizer_lies_in_dram_and_activations_over_cxl_and_the_weights_are_the_same_bits(
    ranks: RankPool, corpus: str, tmp_path: Path
) -> None:
    here = ranks.run(stepped, 2, a_run(corpus, tmp_path / "here"), str(tmp_path / "cache"))
    away = ranks.run(stepped, 2, a_run(corpus, tmp_path / "away", *AWAY, TWO_CXL), str(tmp_path / "cache"))
    assert all(same(a["weights"], b["weights"]) for a, b in zip(here, away, strict=True))
    for found in away:
        nbytes, shares = found["given"][ACTIVATIONS]
        assert [name for name, _ in shares] == ["cxl:emulated:64MiB (emulated)", "cxl:emulated:64MiB #2 (emulated)"]
        assert all(owners.keys() == {"activations"} for owners in found["activations"])
        held = sum(owners["activations"] for owners in found["activations"])
        # The last layer stays, and so does what is too small to move.
        assert 0.3 * nbytes < held <= nbytes
        nbytes, shares = found["given"][OPTIMIZER]
        assert shares == (("dram:64MiB", nbytes),)
        assert found["optimizer"].tier == "dram"
        assert found["optimizer"].owners == {"optimizer": nbytes}, "moments, masters and gradients, to the byte"
        assert any("computed on" in note for note in found["notes"])


def test_gradients_over_two_kinds_of_tier_are_those_of_a_run_without_offload(
    ranks: RankPool, corpus: str, tmp_path: Path
) -> None:
    want = ranks.run(gradients, 2, a_run(corpus, tmp_path / "here"), str(tmp_path / "cache"))
    small = ["memory.offload_activations=auto", "memory.tiers=['cxl:emulated:1500KiB','dram:64MiB']"]
    found = ranks.run(gradients, 2, a_run(corpus, tmp_path / "away", *small), str(tmp_path / "cache"))
    assert all(same(a, b) for a, b in zip(want, found, strict=True))


def test_every_rank_and_every_later_start_decides_the_same_whatever_is_measured_then(
    ranks: RankPool, corpus: str, tmp_path: Path
) -> None:
    config = a_run(corpus, tmp_path / "run", *AWAY, TWO_CXL.replace("64MiB','dram:64MiB", "32MiB"))
    first = ranks.run(stepped, 2, config, str(tmp_path / "cache"))
    kept = (tmp_path / "run" / FILE).read_text()
    content = json.loads(kept)
    assert {row["tier"] for row in content["rows"]} == {"cxl:emulated:64MiB", "cxl:emulated:32MiB"}
    assert content["host_bytes"] > 0
    again = ranks.run(stepped, 2, config, str(tmp_path / "cache"))
    assert len({json.dumps(found["given"]) for found in (*first, *again)}) == 1
    assert (tmp_path / "run" / FILE).read_text() == kept
    speeds = tmp_path / "speeds.json"
    row = {"write_bytes_per_s": 1e12, "read_latency_s": 0.0, "write_latency_s": 0.0}
    rows = [
        {"tier": tier, "read_bytes_per_s": speed, **row}
        for tier, speed in (("cxl:emulated:64MiB", 3e9), ("cxl:emulated:32MiB", 1e9))
    ]
    speeds.write_text(json.dumps({"rows": rows}))
    config.memory.speeds = str(speeds)
    told = ranks.run(stepped, 2, config, str(tmp_path / "cache"))
    (_, fast), (_, slow) = told[0]["given"][ACTIVATIONS][1]
    assert fast / slow == pytest.approx(3, rel=1e-3)
    held = [owners["activations"] for owners in told[0]["activations"]]
    assert held[0] / held[1] == pytest.approx(3, rel=0.35), "whole tensors are dealt out, and there are few"
