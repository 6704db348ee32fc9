"""A rank that runs out of memory: what every rank put aside is gone on from, and nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.corpus import small_corpus
from tests.support.ranks import RankFailed, RankPool
from tests.support.runs import tiny_run

from farspan.config.schema import RunConfig
from farspan.storage.door import open_store
from farspan.telemetry.events import EventBody, Note, StepReport
from farspan.train.build import build
from farspan.train.ladder import step_down
from farspan.train.loop import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_corpus(tmp_path_factory.mktemp("rescue"))


def run_with_fault(config: RunConfig, cache: str, rank: int, step: int, place: str) -> list[EventBody]:
    """Run to the end; in `step`, `rank` has no memory left: behind its last layer, or while weights change."""
    training = build(config, CPU, Path(cache))
    events: list[EventBody] = []
    passed = 0

    def no_memory(*_: Any) -> None:
        nonlocal passed
        passed += 1
        if torch.distributed.get_rank() == rank and passed == step:
            raise torch.OutOfMemoryError("no 3 GiB left")

    if place == "forward":
        training.step.loss.model.model.norm.register_forward_pre_hook(no_memory)
    else:
        training.step.weights.optimizer.register_step_pre_hook(no_memory)
    train(training, config, events.append)
    return events


def losses(events: list[EventBody]) -> dict[int, float]:
    return {e.step: e.loss for e in events if isinstance(e, StepReport)}


def run(
    ranks: RankPool, config: RunConfig, cache: Path, fault: tuple[int, int] = (-1, -1), place: str = "forward"
) -> Any:
    return ranks.run(run_with_fault, config.parallel.workers, config, str(cache), *fault, place)[0]


LAYOUTS = [["parallel.workers=2", "parallel.sp=2"], ["parallel.workers=3"], ["parallel.workers=1"]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
def test_a_run_that_ran_out_of_memory_goes_on_from_the_same_batch_bit_for_bit(
    ranks: RankPool, corpus: str, tmp_path: Path, layout: list[str]
) -> None:
    whole = losses(run(ranks, tiny_run(corpus, str(tmp_path / "whole"), *layout), tmp_path))
    config = tiny_run(corpus, str(tmp_path / "run"), *layout)
    failing = config.parallel.workers - 1
    with pytest.raises(RankFailed, match=rf"rank {failing} ran out of memory in step 3: no 3 GiB left"):
        run(ranks, config, tmp_path, (failing, 3))
    events = run(ranks, config, tmp_path)
    assert losses(events) == {3: whole[3], 4: whole[4]}
    assert "put aside after step 2" in next(e.text for e in events if isinstance(e, Note))
    # Past its checkpoint, nothing of it is left.
    assert open_store(f"{config.output}/rescue").list() == []


def test_a_run_that_starts_over_goes_on_from_its_own_step_beside_checkpoints_of_an_older_run(
    ranks: RankPool, corpus: str, tmp_path: Path
) -> None:
    older = tiny_run(corpus, str(tmp_path / "run"), "optim.lr=0.01")
    run(ranks, older, tmp_path)
    config = tiny_run(corpus, older.output, "train.resume=false")
    with pytest.raises(RankFailed, match="rank 0 ran out of memory in step 3"):
        run(ranks, config, tmp_path, (0, 3))
    assert list(losses(run(ranks, config, tmp_path))) == [3, 4]


def test_a_second_failure_right_after_the_first_loses_and_repeats_no_step(
    ranks: RankPool, corpus: str, tmp_path: Path
) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), "parallel.workers=2")
    whole = losses(run(ranks, tiny_run(corpus, str(tmp_path / "whole"), "parallel.workers=2"), tmp_path))
    for rank, step_of_attempt in ((1, 2), (0, 1), (0, 2)):
        with pytest.raises(RankFailed, match="ran out of memory"):
            run(ranks, config, tmp_path, (rank, step_of_attempt))
    assert losses(run(ranks, config, tmp_path)) == {3: whole[3], 4: whole[4]}


def test_the_lower_plan_goes_on_with_the_same_sequences(ranks: RankPool, corpus: str, tmp_path: Path) -> None:
    layout = ["parallel.workers=2", "memory.tiled_mlp=true", "train.recompute=true", "memory.offload_activations=cpu"]
    whole = losses(run(ranks, tiny_run(corpus, str(tmp_path / "whole"), *layout), tmp_path))
    config = tiny_run(corpus, str(tmp_path / "run"), *layout)
    with pytest.raises(RankFailed, match="rank 1 ran out of memory in step 3"):
        run(ranks, config, tmp_path, (1, 3))
    lower = step_down(config, frozenset({("memory.chunk", "memory.chunk_tokens")}))
    assert lower is not None
    assert (lower[0].parallel.sp, lower[0].train.accumulation) == (2, 2)
    assert losses(run(ranks, lower[0], tmp_path)) == pytest.approx({3: whole[3], 4: whole[4]}, rel=1e-12)


def test_a_rank_that_fails_while_weights_change_leaves_only_the_checkpoint(
    ranks: RankPool, corpus: str, tmp_path: Path
) -> None:
    layout = ["parallel.workers=2", "train.checkpoint_every=1"]
    whole = losses(run(ranks, tiny_run(corpus, str(tmp_path / "whole"), *layout), tmp_path))
    config = tiny_run(corpus, str(tmp_path / "run"), *layout)
    with pytest.raises(RankFailed, match="rank 1 ran out of memory in step 3"):
        run(ranks, config, tmp_path, (1, 3), "optimizer")
    events = run(ranks, config, tmp_path)
    assert losses(events) == {3: whole[3], 4: whole[4]}
    assert "resumed after step 2" in next(e.text for e in events if isinstance(e, Note))
