"""parallel.hdp_cost=measured on one rank: what a clock says is found, kept, and read ever after."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.support.hybrid import CPU, hybrid_run, long_tailed_corpus

from farspan.config.schema import RunConfig
from farspan.data.balance import Cost
from farspan.errors import CorruptDataError, OutOfMemoryError
from farspan.plan.facts import model_facts
from farspan.plan.hybrid import HDP_COST
from farspan.train.build import build
from farspan.train.hdp_cost import cost_key, forget_cost, measured_cost
from farspan.train.step import TrainStep

TRUE = Cost(quadratic=3e-6, linear=2e-4, fixed=5e-3, each=4e-4)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return long_tailed_corpus(tmp_path_factory.mktemp("hdp-cost"))


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass
class Clock:
    """Stands still but for the forwards of a step, each of which takes what `cost` says."""

    cost: Cost
    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def forward(self, _module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        lengths = [stop - start for start, stop in pairwise(inputs[0].bounds)]
        self.now += sum(map(self.cost.document, lengths)) + self.cost.fixed


def built(corpus: str, tmp_path: Path, *overrides: str) -> tuple[RunConfig, TrainStep]:
    """A run that counts, ready to be measured."""
    config = hybrid_run(corpus, tmp_path, "parallel.strategy=ring", *overrides)
    return config, build(config, CPU, tmp_path / "cache").step


def measured(config: RunConfig, step: TrainStep, cost: Cost) -> tuple[Cost, str]:
    """What is found with a clock that follows `cost`."""
    clock = Clock(cost)
    assert step.hybrid is not None
    hook = step.loss.register_forward_pre_hook(clock.forward)
    try:
        key = cost_key(config, model_facts(step.loss.model.config), step.hybrid.strategy, torch.float64)
        return measured_cost(config, key, step, clock)
    finally:
        hook.remove()


@pytest.mark.usefixtures("one_rank")
def test_the_cost_a_clock_follows_is_found_by_running_the_model(corpus: str, tmp_path: Path) -> None:
    config, step = built(corpus, tmp_path)
    before = [weight.clone() for weight in step.loss.parameters()]
    random = torch.get_rng_state()
    found, why = measured(config, step, TRUE)
    for name in ("quadratic", "linear", "fixed", "each"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-6), name
    assert (found.message, found.travel) == (0, 0), "one rank shares nothing"
    assert why.startswith("parallel.hdp_cost=measured: a document of s tokens takes 3e-06 s^2 + 0.0002 s")
    assert str(tmp_path / "run" / HDP_COST) in why
    assert all(torch.equal(now, was) for now, was in zip(step.loss.parameters(), before, strict=True))
    assert all(weight.grad is None for weight in step.loss.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert (step.cursor, step.reader.take()) == (0, {})


@pytest.mark.usefixtures("one_rank")
def test_what_was_measured_once_is_read_ever_after_whatever_clock_and_machine(corpus: str, tmp_path: Path) -> None:
    config, step = built(corpus, tmp_path)
    first, _ = measured(config, step, TRUE)
    file = tmp_path / "run" / HDP_COST
    elsewhere = json.loads(file.read_text())
    elsewhere["costs"][0]["machine"] = "another machine"
    file.write_text(json.dumps(elsewhere))
    again, why = measured(config, step, Cost(1.0, 1.0))
    assert again == first, "to the last bit"
    assert "another machine" in why
    assert json.loads(file.read_text()) == elsewhere


@pytest.mark.usefixtures("one_rank")
def test_another_layout_is_measured_beside_the_first_and_neither_again(corpus: str, tmp_path: Path) -> None:
    config, step = built(corpus, tmp_path)
    first, _ = measured(config, step, TRUE)
    config.train.recompute = True
    slower = Cost(2 * TRUE.quadratic, TRUE.linear)
    second, _ = measured(config, step, slower)
    assert second.quadratic == pytest.approx(slower.quadratic)
    for recompute, want in ((False, first), (True, second)):
        config.train.recompute = recompute
        assert measured(config, step, Cost(1.0, 1.0))[0] == want


@pytest.mark.usefixtures("one_rank")
def test_a_run_that_starts_over_is_measured_anew(corpus: str, tmp_path: Path) -> None:
    config, step = built(corpus, tmp_path)
    measured(config, step, TRUE)
    config.train.resume = False
    other = Cost(1e-5, 1e-3)
    assert measured(config, step, other)[0].quadratic == pytest.approx(1e-5)
    config.train.resume = True
    assert measured(config, step, TRUE)[0].quadratic == pytest.approx(1e-5)
    forget_cost(config.output)
    forget_cost(config.output)
    assert measured(config, step, TRUE)[0].quadratic == pytest.approx(TRUE.quadratic)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2, "costs": []}', '{"format": 1, "costs": [{"key": {}}]}'])
def test_a_file_that_is_no_measured_cost_is_refused_with_the_way_out(corpus: str, tmp_path: Path, text: str) -> None:
    config, step = built(corpus, tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / HDP_COST).write_text(text)
    with pytest.raises(CorruptDataError, match=r"is no measured cost \(.*\); restore it, or remove it"):
        measured(config, step, TRUE)


@pytest.mark.usefixtures("one_rank")
def test_no_memory_for_measuring_is_told_as_a_step_without_memory_and_nothing_is_kept(
    corpus: str, tmp_path: Path
) -> None:
    config, step = built(corpus, tmp_path)

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nand a stack")

    step.loss.register_forward_pre_hook(no_room)
    with pytest.raises(OutOfMemoryError, match=r"parallel.hdp_cost=measured: CUDA out of memory\.$") as caught:
        measured(config, step, TRUE)
    assert (caught.value.rank, caught.value.step) == (0, 0)
    assert not (tmp_path / "run" / HDP_COST).exists()
