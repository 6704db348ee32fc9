"""Resumable checkpoints: an ordinary Hugging Face folder with the optimizer's states and the cursor beside it.

`<output>/checkpoints/step-00000050/` holds config, tokenizer, model.safetensors (fp32 weights), optimizer.safetensors
and train_state.json; with LoRA, the adapter in peft's format instead of the model, and which model it belongs to. It
appears whole or not at all (storage.publish). Tensors are gathered on rank 0, whichever engine keeps them.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from farspan.errors import CheckpointError, CorruptDataError, FarspanError, NotFoundError, TrainingError
from farspan.models.checkpoint import load_causal_lm, save_causal_lm
from farspan.models.lora import Adapter, is_adapter_folder, load_adapter, merged_weights, save_adapter
from farspan.storage.door import open_store
from farspan.storage.manifest import MANIFEST_NAME
from farspan.storage.publish import fetch_folder, is_published, publish_folder
from farspan.telemetry.events import CheckpointPublished
from farspan.train.weights import WeightsEngine
from farspan.verify.certificate import CERTIFICATE

Result = TypeVar("Result")

_OPTIMIZER, _STATE = "optimizer.safetensors", "train_state.json"


@dataclass(frozen=True)
class Resumed:
    """The state a run goes on from, and why newer checkpoints were passed over."""

    state: TrainState
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class TrainState:
    """Where a run stands, and what must not change when it goes on."""

    step: int
    cursor: int
    seed: int
    sequence_tokens: int
    corpus_fingerprint: str
    samples: str = ""
    """Hash of the sequences consumed so far (train.samples)."""

    def refuse_other_data(self, now: TrainState) -> None:
        """Refuse to go on with data in another order: samples would be lost or repeated silently."""
        for name in ("seed", "sequence_tokens", "corpus_fingerprint"):
            was, is_now = getattr(self, name), getattr(now, name)
            if was != is_now:
                raise CheckpointError(
                    "train.resume",
                    f"the checkpoint was written with {name}={was}, this run has {is_now}; "
                    "restore it, choose another output, or set train.resume=false",
                )


def save_checkpoint(
    output: str,
    engine: WeightsEngine,
    state: TrainState,
    tokenizer: PreTrainedTokenizerBase,
    certificate: str | None = None,
    adapter: Adapter | None = None,
) -> CheckpointPublished:
    """Publish a checkpoint of all ranks; collective. Every rank returns, or every rank raises.

    Raises:
        StorageError: rank 0 could not publish; nothing half-written is visible.
    """
    started = time.perf_counter()
    weights = engine.whole_weights(trained_only=adapter is not None)
    states = engine.whole_states()
    uri = f"{output.rstrip('/')}/checkpoints/step-{state.step:08d}"

    def publish() -> int:
        with tempfile.TemporaryDirectory(prefix="farspan-checkpoint-") as scratch:
            folder = Path(scratch) / "checkpoint"
            if adapter is None:
                save_causal_lm(folder, engine.module.model.config, _model_names(weights), tokenizer)
            else:
                save_adapter(folder, adapter, _model_names(weights))
                tokenizer.save_pretrained(folder)
            save_file(states, folder / _OPTIMIZER)
            (folder / _STATE).write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
            if certificate is not None:
                (folder / CERTIFICATE).write_text(certificate, encoding="utf-8")
            publish_folder(folder, uri)
            return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    num_bytes = on_rank_0(publish)
    return CheckpointPublished(step=state.step, uri=uri, seconds=time.perf_counter() - started, bytes=num_bytes)


def save_model(
    output: str, engine: WeightsEngine, tokenizer: PreTrainedTokenizerBase, adapter: Adapter | None = None
) -> str:
    """Publish the weights alone as `<output>/model`, an ordinary Hugging Face folder; collective.

    An adapter is merged into it, and published by itself as `<output>/adapter`.
    """
    weights = engine.whole_weights(trained_only=False)
    output = output.rstrip("/")
    config = engine.module.model.config

    def publish() -> str:
        named = _model_names(weights)
        with tempfile.TemporaryDirectory(prefix="farspan-model-") as scratch:
            if adapter is not None:
                matrices = {name: t for name, t in named.items() if ".lora_" in name}
                save_adapter(Path(scratch) / "adapter", adapter, matrices)
                publish_folder(Path(scratch) / "adapter", f"{output}/adapter")
                named = merged_weights(config, adapter.config, named, next(iter(matrices.values())).dtype)
            save_causal_lm(Path(scratch) / "model", config, named, tokenizer)
            publish_folder(Path(scratch) / "model", f"{output}/model")
        return f"{output}/model"

    return on_rank_0(publish)


def load_newest(output: str, engine: WeightsEngine, now: TrainState, adapter: Adapter | None = None) -> Resumed | None:
    """Put the newest whole checkpoint of a run into the engine; None when there is none. Collective.

    Raises:
        CheckpointError: the checkpoint belongs to other data, another adapter or another base model.
    """
    weights: dict[str, Any] = {}
    states: dict[str, Tensor] = {}

    def read() -> Resumed | None:
        # Everything that can fail happens here, on rank 0, so that every rank hears of it.
        with tempfile.TemporaryDirectory(prefix="farspan-resume-") as cache:
            found = _newest_folder(output, Path(cache), now)
            if found is None:
                return None
            folder, resumed = found
            weights.update(_read_weights(folder, engine, adapter))
            states.update(load_file(folder / _OPTIMIZER))
            return resumed

    resumed = on_rank_0(read)
    if resumed is not None:
        engine.load(weights, states, trained_only=adapter is not None)
    return resumed


def list_checkpoints(output: str) -> list[str]:
    """URIs of a run's checkpoints, newest first."""
    store = open_store(f"{output.rstrip('/')}/checkpoints")
    steps = {file.path.split("/")[0] for file in store.list()}
    uris = [f"{store.uri.rstrip('/')}/{step}" for step in sorted(steps, reverse=True) if step.startswith("step-")]
    # A step whose upload was cut off has files but no manifest: it is not there.
    return [uri for uri in uris if is_published(uri)]


def clear_checkpoints(output: str) -> int:
    """Remove every checkpoint of a run that starts over; how many there were."""
    uris = list_checkpoints(output)
    store = open_store(f"{output.rstrip('/')}/checkpoints")
    files = [file for file in store.list() if file.path.startswith("step-")]
    # Manifests first: what is half removed when this process dies is not there.
    for file in sorted(files, key=lambda file: not file.path.endswith(MANIFEST_NAME)):
        store.delete(file.path)
    return len(uris)


def newest_step(output: str) -> int:
    """Steps done at a run's newest checkpoint; 0 when there is none."""
    uris = list_checkpoints(output)
    return int(uris[0].rpartition("-")[2]) if uris else 0


def on_rank_0(act: Callable[[], Result]) -> Result:
    """Run `act` on rank 0 and give its result, or its error, to every rank: nobody waits for a rank that failed."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = act()
        except FarspanError as problem:
            outcome[1] = problem
        except Exception as problem:
            outcome[1] = TrainingError(f"rank 0 failed: {type(problem).__name__}: {problem}")
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return cast(Result, outcome[0])


def _newest_folder(output: str, cache: Path, now: TrainState) -> tuple[Path, Resumed] | None:
    skipped: list[str] = []
    for uri in list_checkpoints(output):
        try:
            folder = fetch_folder(uri, cache)
            state = TrainState(**json.loads((folder / _STATE).read_text(encoding="utf-8")))
        except (CorruptDataError, NotFoundError) as problem:
            skipped.append(f"checkpoint passed over: {problem}")
            continue
        state.refuse_other_data(now)
        return folder, Resumed(state, tuple(skipped))
    return None


def _model_names(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


def _read_weights(folder: Path, engine: WeightsEngine, adapter: Adapter | None) -> dict[str, Tensor]:
    if is_adapter_folder(folder) != (adapter is not None):
        was, is_now = ("an adapter", "every weight") if adapter is None else ("every weight", "an adapter")
        raise CheckpointError(
            "lora.rank",
            f"the checkpoint holds {was}, this run trains {is_now}; "
            "restore it, choose another output, or set train.resume=false",
        )
    if adapter is not None:
        return {f"model.{name}": tensor for name, tensor in load_adapter(folder, adapter).items()}
    # Through transformers, which renames some models' weights when it saves and back when it loads.
    dtype = torch.promote_types(next(engine.module.parameters()).dtype, torch.float32)
    return {f"model.{name}": tensor for name, tensor in load_causal_lm(folder, dtype).state_dict().items()}
