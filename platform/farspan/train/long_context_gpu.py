"""What one GPU trains under a memory cap: real steps of a run, beside what the planner said of them.

A step goes the way `farspan train` goes (corpus, build, TrainStep), in a process of its own, on an 8B-shaped Llama
whose depth is a parameter: what a layer needs does not depend on how many there are, and at half a million tokens the
attention of 32 layers takes a quarter of an hour. What a step waits for offload is the difference to the same step
without.
"""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from farspan.config.load import dump_config, load_config, parse_config
from farspan.config.schema import CorpusConfig, RunConfig
from farspan.data.corpus import build_corpus
from farspan.errors import PlanError
from farspan.models.checkpoint import make_config, random_causal_lm
from farspan.plan.choice import Choice
from farspan.plan.cost import Plan, Task, plan_of_choice
from farspan.plan.exchange import ways_of
from farspan.plan.machine import DEVICES, parse_machine
from farspan.plan.trace import trace_model
from farspan.train.apart import ask_apart
from farspan.train.build import build
from farspan.train.limit import memory_limit

logger = logging.getLogger(__name__)

CAP_GIB = 80.0
_LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
_DEADLINE_S, _GIB = 1200.0, 2**30


@dataclass(frozen=True, slots=True)
class Step:
    """What to train: `layers` of the model, sequences of `tokens`; `lora_rank` 0 trains all weights."""

    layers: int
    tokens: int
    lora_rank: int = 0
    offload: bool = True
    num_steps: int = 2
    """The last one is reported; optimizer states exist from the second on."""


STEPS = (
    Step(4, 131072, offload=False),
    Step(4, 131072),
    Step(2, 524288, lora_rank=16, num_steps=1),
)


@dataclass(frozen=True, slots=True)
class Stepped:
    """A step as it was measured."""

    device_bytes: int
    seconds: float
    loss: float
    grad_norm: float


def bench_one_gpu(
    steps: Sequence[Step] = STEPS, shape: dict[str, Any] | None = None, device: str = "cuda", gpu: str | None = None
) -> list[dict[str, Any]]:
    """One row per step: bytes and seconds, predicted and measured; `gpu` names what the planner thinks of.

    Raises:
        PlanError: a GPU whose data sheet farspan does not know.
        ClusterError: the process of a step died or hung.
    """
    gpu = gpu or _known_gpu()
    rows: list[dict[str, Any]] = []
    alone: dict[Step, float] = {}
    with tempfile.TemporaryDirectory(prefix="farspan-bench-") as scratch:
        corpus = _corpus(Path(scratch), max(step.tokens for step in steps))
        for step in steps:
            config = _config(step, corpus, str(Path(scratch) / "run"), shape or _LLAMA_8B)
            logger.info("%s", step)
            measured = measure_step(config, step.num_steps, device)
            same = replace(step, offload=False)
            if not step.offload:
                alone[same] = measured.seconds
            rows.append(_row(step, predict(config, gpu), measured, alone.get(same)))
    return rows


def _known_gpu() -> str:
    name = torch.cuda.get_device_name().lower()
    found = next((known for known in DEVICES if known in name), None)
    if found is None:
        raise PlanError(f"the data sheet of {name} is not known; farspan knows {', '.join(DEVICES)}")
    return found


def _row(step: Step, plan: Plan, measured: Stepped, alone: float | None) -> dict[str, Any]:
    predicted = sum(size for name, size in plan.footprint.device.items() if name != "allocator slack")
    row = {
        "layers": step.layers,
        "tokens": step.tokens,
        "trained": f"LoRA {step.lora_rank}" if step.lora_rank else "all weights",
        "activations": "in host memory" if step.offload else "on the device",
        "cap_gib": CAP_GIB,
        "predicted_gib": predicted / _GIB,
        "measured_gib": measured.device_bytes / _GIB,
        "measured / predicted": measured.device_bytes / predicted,
        "worst moment": plan.footprint.moment,
        "predicted_s": plan.step_s,
        "measured_s": measured.seconds,
        "loss": measured.loss,
    }
    if step.offload and alone is not None:
        row["exposed offload"] = (measured.seconds - alone) / measured.seconds
    return row


def predict(config: RunConfig, gpu: str) -> Plan:
    """What the planner says of a run of one process."""
    choice = Choice(
        tiled_mlp=config.memory.tiled_mlp,
        loss_tile_tokens=config.train.loss_tile_tokens,
        recompute=config.train.recompute,
        offload_activations=config.memory.offload_activations,
        lora_rank=config.lora.rank,
    )
    profile = trace_model(make_config(config.model.architecture, config.model.settings, {}))
    machine = parse_machine(f"{gpu}:1", 1, memory_gib=CAP_GIB)
    return plan_of_choice(Task(profile, machine, config.data.sequence_tokens, ways_of(profile, [1])), choice)


def measure_step(config: RunConfig, num_steps: int, device: str) -> Stepped:
    """The last of `num_steps` steps of `config` in a process of its own.

    Raises:
        ClusterError: the process died or hung.
    """
    what = f"a step of {config.data.sequence_tokens} tokens"
    found = ask_apart(_in_process, (dump_config(config), num_steps, device), what, _DEADLINE_S)
    assert isinstance(found, Stepped), "the process sends what it measured"
    return found


def _in_process(pipe: Connection, text: str, num_steps: int, kind: str) -> None:
    config = parse_config(RunConfig, text)
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    backend = "nccl" if kind == "cuda" else "gloo"
    with tempfile.TemporaryDirectory(prefix="farspan-cache-") as cache, memory_limit(device, _cap(device)):
        dist.init_process_group(backend, init_method=f"file://{cache}/ranks", rank=0, world_size=1)
        # Made where it runs: a GPU draws two billion numbers at once, a processor takes minutes.
        with device:
            model = random_causal_lm(make_config(config.model.architecture, config.model.settings, {}), config.seed)
        training = build(config, device, Path(cache) / "files", model)
        reports = [training.step.run(number) for number in range(num_steps)]
        training.step.close()
        dist.destroy_process_group()
    last = reports[-1]
    pipe.send(Stepped(last.peak_memory_bytes, last.step_s, last.loss, last.grad_norm))


def _cap(device: torch.device) -> float:
    return CAP_GIB if device.type == "cuda" else 0.0


def _config(step: Step, corpus: str, output: str, shape: dict[str, Any]) -> RunConfig:
    settings = {**shape, "num_hidden_layers": step.layers, "max_position_embeddings": step.tokens}
    return load_config(
        RunConfig,
        None,
        [
            f"data.corpus={corpus}",
            f"data.sequence_tokens={step.tokens}",
            f"output={output}",
            "model.architecture=llama",
            *[f"model.settings.{name}={value}" for name, value in settings.items()],
            f"train.steps={step.num_steps}",
            "train.recompute=true",
            "memory.tiled_mlp=true",
            f"memory.offload_activations={'cpu' if step.offload else 'none'}",
            f"lora.rank={step.lora_rank}",
        ],
    )


def _corpus(scratch: Path, tokens: int) -> str:
    """A corpus of one document that fills the longest sequence."""
    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefghijklmnopqrstuvwxyz", k=choose.randint(2, 9))) for _ in range(500)]
    text = scratch / "text" / "one.txt"
    text.parent.mkdir()
    # A word gives two tokens or more of a vocabulary this small.
    text.write_text(" ".join(choose.choices(words, k=tokens)), encoding="utf-8")
    output = scratch / "corpus"
    build_corpus(
        CorpusConfig(sources=[str(text.parent)], pattern="*.txt", output=str(output), vocab_size=400),
        lambda progress: None,
    )
    return str(output)
