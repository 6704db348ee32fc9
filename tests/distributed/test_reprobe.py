"""A running training proves its layout again: it finds a fault that appears on the way, and changes nothing itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.distributed.test_doctor import FaultyLayout, FaultySharing, swapped_stripes
from tests.support.corpus import small_corpus
from tests.support.ranks import RankPool
from tests.support.runs import tiny_run
from tests.support.whole import whole_of
from torch import Tensor

from farspan.config.schema import RunConfig
from farspan.errors import VerifyError
from farspan.telemetry.events import CheckpointPublished, EventBody, LayoutProbed, StepReport
from farspan.train.build import Training, build
from farspan.train.checkpoint import list_checkpoints
from farspan.train.loop import train

Fault = Callable[[Training], None]
HYBRID = {
    "layer_types": "[linear_attention,full_attention]",
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_corpus(tmp_path_factory.mktemp("reprobe"))


def run(
    config: RunConfig, cache: str, fault: Fault | None, after: int
) -> tuple[list[EventBody], dict[str, Tensor], Tensor, str]:
    """(what was told, final weights of this rank, a random number drawn at the end, how it stopped)."""
    torch.manual_seed(7)
    training, told = build(config, torch.device("cpu"), Path(cache)), list[EventBody]()

    def tell(body: EventBody) -> None:
        told.append(body)
        if fault is not None and isinstance(body, StepReport) and body.step == after:
            fault(training)

    stopped = ""
    try:
        train(training, config, tell)
    except VerifyError as problem:
        stopped = str(problem)
    weights = {n: whole_of(p).detach() for n, p in training.step.loss.named_parameters()}
    return told, weights, torch.rand(3), stopped


def losses(told: list[EventBody]) -> list[tuple[float, float, int]]:
    return [(b.loss, b.grad_norm, b.bytes_sent) for b in told if isinstance(b, StepReport)]


@pytest.mark.parametrize(
    ("sharing", "model"),
    [
        (["parallel.workers=4", "parallel.sp=2", "parallel.strategy=ring"], {}),
        (["parallel.workers=2", "parallel.sp=2", "model.architecture=qwen3_5_text", "model.dtype=bfloat16"], HYBRID),
    ],
    ids=["two sequences on two rings", "recurrent layers in bf16"],
)
def test_probing_a_healthy_run_finds_it_equal_and_changes_no_bit_of_it(
    ranks: RankPool, corpus: str, tmp_path: Path, sharing: list[str], model: dict[str, object]
) -> None:
    num_ranks = int(sharing[0][-1])
    answers = {}
    for every in (0, 1):
        config = tiny_run(
            corpus, str(tmp_path / str(every)), *sharing, "train.steps=3", f"train.reprobe_every={every}", **model
        )
        answers[every] = ranks.run(run, num_ranks, config, str(tmp_path / "cache"), None, 0)
    for (plain, plain_weights, plain_random, _), (told, weights, random, stopped) in zip(
        *answers.values(), strict=True
    ):
        assert stopped == ""
        probes = [body for body in told if isinstance(body, LayoutProbed)]
        assert [(probe.step, probe.failed) for probe in probes] == [(1, ()), (2, ()), (3, ())]
        assert all(len(probe.passed) == 5 for probe in probes)
        assert losses(told) == losses(plain)
        assert torch.equal(random, plain_random)
        assert weights.keys() == plain_weights.keys()
        assert all(torch.equal(weights[name], plain_weights[name]) for name in weights)


def merge_documents(training: Training) -> None:
    true = training.step.sequence
    training.step.sequence = FaultySharing(true, rebound=lambda bounds: (0, bounds[-1]))  # type: ignore[assignment]


def swap_stripes(training: Training) -> None:
    true = training.step.sequence
    training.step.sequence = FaultySharing(  # type: ignore[assignment]
        true, relay=lambda layout: FaultyLayout(layout, swapped_stripes)
    )


def scale_loss(training: Training) -> None:
    training.step.loss.register_forward_hook(lambda module, inputs, loss: 2 * loss)


FAULTS: dict[str, tuple[Fault, str]] = {
    "documents merged": (merge_documents, "positions changed by a token they must not see"),
    "stripes swapped": (swap_stripes, "logits"),
    "loss counted twice": (scale_loss, "loss"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_appears_during_a_run_stops_every_rank_and_the_last_checkpoint_stays(
    ranks: RankPool, corpus: str, tmp_path: Path, fault: str
) -> None:
    break_it, differs = FAULTS[fault]
    config = tiny_run(
        corpus, str(tmp_path / "run"), "parallel.workers=2", "parallel.sp=2", "parallel.strategy=ring",
        "train.steps=6", "train.checkpoint_every=2", "train.reprobe_every=1", "model.dtype=float32",
    )  # fmt: skip
    for told, _, _, stopped in ranks.run(run, 2, config, str(tmp_path / "cache"), break_it, 4):
        assert "after step 4 the sharded run no longer equals one process" in stopped
        assert differs in stopped
        *healthy, broken = [body for body in told if isinstance(body, LayoutProbed)]
        assert [probe.failed for probe in healthy] == [(), (), ()]
        assert any(sentence.startswith(differs) for sentence in broken.failed)
        assert [body.step for body in told if isinstance(body, CheckpointPublished)] == [2]
    assert [uri.rsplit("/", 1)[1] for uri in list_checkpoints(config.output)] == ["step-00000002"]
