"""One GPU beside the CPU: the same run, and what moves between the device and the host changes no bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.support.corpus import small_corpus
from tests.support.runs import tiny_run

from farspan.config.schema import RunConfig
from farspan.telemetry.events import EventBody, Note, StepReport
from farspan.train.build import build
from farspan.train.limit import memory_limit
from farspan.train.loop import train
from farspan.train.rescue import is_out_of_memory

pytestmark = pytest.mark.gpu

# Heads of 64 in bf16 take the flash kernels, fp32 takes Triton's.
_WIDE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_corpus(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(params=["cuda"])
def alone(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """This process as the only rank of a run on a GPU."""
    device = torch.device(request.param, 0)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield device
    dist.destroy_process_group()


def steps(config: RunConfig, device: torch.device, cache: Path, count: int = 4) -> tuple[list[StepReport], list[float]]:
    """(reports of the first steps, every weight after them as one list of sums)."""
    training = build(config, device, cache)
    try:
        reports = [training.step.run(number) for number in range(count)]
        weights = training.step.weights.whole_weights(trained_only=False)
        return reports, [float(weight.double().sum()) for _, weight in sorted(weights.items())]
    finally:
        training.step.close()


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["train.recompute=true", "memory.tiled_mlp=true"],
        ["memory.chunk=seco", "memory.chunk_tokens=64"],
        ["memory.chunk=seco", "memory.chunk_tokens=64", "memory.offload_activations=cpu"],
        ["memory.offload_activations=cpu", "train.recompute=true", "memory.swap_share=0.5"],
        ["weights.offload_optimizer=cpu", "train.accumulation=2"],
    ],
    ids=lambda more: " ".join(more) or "plain",
)
def test_losses_in_fp32_equal_those_of_the_cpu(
    alone: torch.device, corpus: str, tmp_path: Path, more: list[str]
) -> None:
    fp32 = ["model.dtype=float32", "data.sequence_tokens=256", *more]
    config = tiny_run(corpus, str(tmp_path / "run"), *fp32, **_WIDE)
    want, _ = steps(config, torch.device("cpu"), tmp_path / "cpu")
    got, _ = steps(config, alone, tmp_path / "gpu")
    for mine, theirs in zip(got, want, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=2e-5)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=2e-3)


@pytest.mark.parametrize("recompute", ["false", "true"])
def test_offloaded_activations_give_the_same_losses_and_weights_bit_for_bit(
    alone: torch.device, corpus: str, tmp_path: Path, recompute: str
) -> None:
    found = []
    # Twice without: torch's flash kernel adds up gradients in any order, Triton's in fp32 does not.
    for number, place in enumerate(("none", "none", "cpu")):
        single = ["model.dtype=float32", "data.sequence_tokens=1024", f"train.recompute={recompute}"]
        where = f"memory.offload_activations={place}"
        config = tiny_run(corpus, str(tmp_path / str(number)), *single, where, num_hidden_layers=6, **_WIDE)
        reports, weights = steps(config, alone, tmp_path / f"cache-{number}", 10)
        found.append(([report.loss for report in reports], weights))
    assert found[0] == found[1], "the same run twice"
    assert found[0] == found[2]


def test_an_optimizer_on_the_host_steps_as_the_one_on_the_device(
    alone: torch.device, corpus: str, tmp_path: Path
) -> None:
    losses = []
    for place in ("none", "cpu"):
        config = tiny_run(
            corpus, str(tmp_path / place), "model.dtype=float32", f"weights.offload_optimizer={place}", **_WIDE
        )
        reports, _ = steps(config, alone, tmp_path / f"cache-{place}", 8)
        losses.append([report.loss for report in reports])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_8_bit_states_on_a_gpu_stay_within_one_percent_of_fp32_states(
    alone: torch.device, corpus: str, tmp_path: Path
) -> None:
    losses = []
    for kind in ("adamw", "adamw8bit"):
        settings = ["model.dtype=bfloat16", "data.sequence_tokens=256", f"optim.kind={kind}", "train.steps=60"]
        reports, _ = steps(
            tiny_run(corpus, str(tmp_path / kind), *settings, **_WIDE), alone, tmp_path / f"cache-{kind}", 60
        )
        losses.append([report.loss for report in reports])
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.01)


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_run_resumed_from_a_checkpoint_equals_the_whole_run(
    alone: torch.device, corpus: str, tmp_path: Path, background: str
) -> None:
    def run(output: str, num_steps: int) -> list[EventBody]:
        # A learning rate that does not know where the run ends.
        shared = ["model.dtype=float32", "optim.final_lr_fraction=1", f"train.checkpoint_async={background}"]
        config = tiny_run(corpus, output, *shared, "train.checkpoint_every=3", f"train.steps={num_steps}", **_WIDE)
        told: list[EventBody] = []
        train(build(config, alone, tmp_path / f"cache-{len(list(tmp_path.iterdir()))}"), config, told.append)
        return told

    whole = [event for event in run(str(tmp_path / "whole"), 6) if isinstance(event, StepReport)]
    run(str(tmp_path / "parts"), 3)
    told = run(str(tmp_path / "parts"), 6)
    assert any(isinstance(event, Note) and "resumed after step 3" in event.text for event in told)
    rest = [event for event in told if isinstance(event, StepReport)]
    assert [event.samples for event in rest] == [event.samples for event in whole[3:]]
    assert [event.loss for event in rest] == pytest.approx([event.loss for event in whole[3:]], rel=1e-6)


def test_memory_beyond_the_limit_is_told_as_memory_that_ran_out(
    alone: torch.device, corpus: str, tmp_path: Path
) -> None:
    held = torch.cuda.memory_allocated(alone) / 2**30
    with memory_limit(alone, held + 0.25), pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(1 << 30, dtype=torch.uint8, device=alone)
    assert is_out_of_memory(caught.value)
