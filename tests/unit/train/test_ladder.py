"""The plans a run falls back to when memory does not suffice."""

from __future__ import annotations

import itertools

import pytest

from farspan.config.check import check_run
from farspan.config.load import load_config
from farspan.config.schema import RunConfig
from farspan.train.ladder import Ladder, step_down


def run_config(*overrides: str) -> RunConfig:
    base = ["data.corpus=nowhere", "data.sequence_tokens=65536", "parallel.workers=4", "resources.gpus_per_worker=1"]
    return load_config(RunConfig, None, [*base, *(one for text in overrides for one in text.split())])


def all_the_way_down(config: RunConfig) -> list[RunConfig]:
    ladder, seen = Ladder(config), [config]
    while ladder.down() is not None:
        seen.append(ladder.config)
        assert len(seen) < 100
    return seen


STARTS = [
    list(chosen)
    for chosen in itertools.product(
        ("parallel.sp=1", "parallel.sp=2", "parallel.sp=4"),
        ("train.recompute=false", "train.recompute=true"),
        ("parallel.strategy=ulysses", "parallel.strategy=ring", "parallel.strategy=allgather memory.chunk=seco"),
    )
]


@pytest.mark.parametrize("start", STARTS, ids=" ".join)
def test_every_rung_is_legal_and_different_and_trains_on_the_same_sequences(start: list[str]) -> None:
    plans = all_the_way_down(run_config(*start))
    sequences = {p.parallel.workers // p.parallel.sp * p.train.accumulation for p in plans}
    assert len(sequences) == 1
    for plan in plans:
        check_run(plan)
    for above, below in itertools.pairwise(plans):
        assert above != below
        assert below.train.loss_tile_tokens <= above.train.loss_tile_tokens
        assert below.parallel.sp >= above.parallel.sp
    assert plans[-1].parallel.sp == 4
    assert plans[-1].memory.chunk == "seco"


def test_a_swap_does_not_keep_a_run_from_its_chunks() -> None:
    plans = all_the_way_down(
        run_config("train.recompute=true", "memory.offload_activations=cpu", "memory.swap_share=auto")
    )
    chunked = [plan for plan in plans if plan.memory.chunk == "seco"]
    assert chunked
    assert all(plan.memory.swap_share == 0 for plan in chunked)


def test_the_cheapest_rung_comes_first() -> None:
    changes = all_the_way_down(run_config())[1:4]
    assert changes[0].memory.tiled_mlp
    assert changes[0].train.loss_tile_tokens == 512
    assert changes[1].train.recompute
    assert changes[2].memory.offload_activations == "cpu"


def test_chunks_take_their_keys_and_values_to_host_memory_before_they_get_smaller() -> None:
    chunked = run_config("memory.chunk=seco", "memory.chunk_tokens=8192", "memory.tiled_mlp=true")
    plans = [plan.memory for plan in all_the_way_down(chunked)[1:3]]
    assert [(m.offload_activations, m.chunk_tokens) for m in plans] == [("cpu", 8192), ("cpu", 4096)]


def test_on_a_cpu_nothing_is_moved_to_the_memory_that_did_not_suffice() -> None:
    plans = all_the_way_down(run_config("resources.gpus_per_worker=0"))
    assert {plan.memory.offload_activations for plan in plans} == {"none"}


def test_a_rung_the_model_does_not_allow_is_replaced_by_another() -> None:
    ladder = Ladder(run_config("train.recompute=true", "memory.tiled_mlp=true", "memory.offload_activations=cpu"))
    first = ladder.down()
    assert first is not None
    assert "memory.chunk" in first.fields
    second = ladder.other()
    assert second is not None
    assert ladder.config.memory.chunk == "none"
    assert ladder.config.parallel.sp == 2


def test_the_config_that_was_given_is_not_changed() -> None:
    config = run_config()
    before = run_config()
    step_down(config)
    assert config == before


def test_there_is_no_rung_below_the_last() -> None:
    last = all_the_way_down(run_config())[-1]
    assert step_down(last) is None
    assert Ladder(last).other() is None
