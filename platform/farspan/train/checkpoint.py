"""Resumable checkpoints: an ordinary Hugging Face folder with the optimizer's states and the cursor beside it.

`<output>/checkpoints/step-00000050/` holds config, tokenizer, model.safetensors (fp32 weights), optimizer.safetensors,
rng.safetensors, train_state.json, the run's config, plan and certificate; with LoRA, the adapter in peft's format
instead of the model, and which model it belongs to. With train.checkpoint_async nothing is gathered: shards.json names
the piece of each rank (train.shards) instead. It appears whole or not at all (storage.publish). See train.saver.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from farspan.errors import CheckpointError, CorruptDataError, FarspanError, NotFoundError, TrainingError
from farspan.models.checkpoint import load_causal_lm, save_causal_lm
from farspan.models.lora import Adapter, is_adapter_folder, load_adapter, merged_weights, save_adapter
from farspan.storage.door import open_store
from farspan.storage.manifest import read_manifest
from farspan.storage.paths import join_uri
from farspan.storage.patience import patiently
from farspan.storage.publish import fetch_folder, is_published, publish_folder
from farspan.train.retention import remove_folder
from farspan.train.shards import ShardIndex, read_piece, read_whole
from farspan.train.weights import WeightsEngine

Result = TypeVar("Result")

OPTIMIZER, STATE, RNG = "optimizer.safetensors", "train_state.json", "rng.safetensors"
CONFIG, PLAN = "run.yaml", "plan.txt"


@dataclass(frozen=True)
class Resumed:
    """The state a run goes on from, and why newer checkpoints were passed over."""

    state: TrainState
    skipped: tuple[str, ...]
    uri: str
    rng: Mapping[str, Tensor]
    """State of every rank's random generators."""
    index: ShardIndex | None = None
    """Where the checkpoint's pieces lie, when each rank reads its own."""


@dataclass(frozen=True)
class TrainState:
    """Where a run stands, and what must not change when it goes on."""

    step: int
    cursor: int
    seed: int
    sequence_tokens: int
    corpus_fingerprint: str
    optim_kind: str = "adamw"
    samples: str = ""
    """Hash of the sequences consumed so far (train.samples)."""

    def refuse_other_run(self, now: TrainState) -> None:
        """Refuse to go on with data in another order, samples would be lost or repeated silently, or with another kind
        of optimizer states, which would be taken for ones of this kind or missed.
        """
        for name in ("seed", "sequence_tokens", "corpus_fingerprint", "optim_kind"):
            was, is_now = getattr(self, name), getattr(now, name)
            if was != is_now:
                raise CheckpointError(
                    "train.resume",
                    f"the checkpoint was written with {name.replace('optim_', 'optim.')}={was}, this run has {is_now}; "
                    "restore it, choose another output, or set train.resume=false",
                )


def save_model(
    output: str,
    engine: WeightsEngine,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Adapter | None = None,
    deadline_s: float = 600.0,
) -> str:
    """Publish the weights alone as `<output>/model`, an ordinary Hugging Face folder; collective.

    An adapter is merged into it, and published by itself as `<output>/adapter`. An object store that does not answer
    is asked again for `deadline_s`.
    """
    weights = engine.whole_weights(trained_only=False)
    output = output.rstrip("/")
    config = engine.module.model.config

    def put(name: str, scratch: Path) -> None:
        patiently(lambda: publish_folder(scratch / name, f"{output}/{name}"), output, deadline_s)

    def publish() -> str:
        named = model_names(weights)
        with tempfile.TemporaryDirectory(prefix="farspan-model-") as scratch:
            if adapter is not None:
                matrices = {name: t for name, t in named.items() if ".lora_" in name}
                save_adapter(Path(scratch) / "adapter", adapter, matrices)
                put("adapter", Path(scratch))
                named = merged_weights(config, adapter.config, named, next(iter(matrices.values())).dtype)
            save_causal_lm(Path(scratch) / "model", config, named, tokenizer)
            put("model", Path(scratch))
        return f"{output}/model"

    return on_rank_0(publish)


def load_newest(
    output: str, engine: WeightsEngine, now: TrainState, adapter: Adapter | None = None, deadline_s: float = 600.0
) -> Resumed | None:
    """Put the newest whole checkpoint of a run into the engine; None when there is none. Collective.

    Raises:
        CheckpointError: the checkpoint belongs to other data, another adapter or another base model.
    """
    weights: dict[str, Any] = {}
    states: dict[str, Tensor] = {}

    def read() -> Resumed | None:
        # Everything that can fail happens here, on rank 0, so that every rank hears of it.
        with tempfile.TemporaryDirectory(prefix="farspan-resume-") as cache:
            found = patiently(lambda: _newest_folder(output, Path(cache), now), output, deadline_s)
            if found is None:
                return None
            folder, resumed = found
            index = ShardIndex.read(folder)
            if index is None:
                weights.update(_read_weights(folder, engine, adapter))
                states.update(load_file(folder / OPTIMIZER))
            elif adapter is not None:
                raise _other_content(adapter)
            elif not engine.held():
                # An engine whose own shards cannot be told: everything on rank 0, as from an ordinary folder.
                whole = read_whole(index, _fetch_pieces(resumed.uri, index, Path(cache), range(index.num_ranks)))
                weights.update(whole[0])
                states.update(whole[1])
            return replace(resumed, index=index if index is not None and engine.held() else None)

    resumed = on_rank_0(read)
    if resumed is None:
        return None
    if resumed.index is None:
        engine.load(weights, states, trained_only=adapter is not None)
    else:
        _load_own_piece(resumed, engine, deadline_s)
    _set_rng(resumed.rng)
    return resumed


def _load_own_piece(resumed: Resumed, engine: WeightsEngine, deadline_s: float) -> None:
    """Each rank reads the rows it holds, wherever they were written. Collective."""
    index, rank, num_ranks = resumed.index, dist.get_rank(), dist.get_world_size()
    assert index is not None, "the checkpoint is in pieces"

    def read() -> None:
        with tempfile.TemporaryDirectory(prefix="farspan-resume-") as cache:
            needed = index.needed(rank, num_ranks)
            folders = patiently(
                lambda: _fetch_pieces(resumed.uri, index, Path(cache), needed, contents=False), resumed.uri, deadline_s
            )
            engine.put_back(read_piece(index, folders, rank, num_ranks, engine.module))

    on_every_rank(read)


def _fetch_pieces(
    uri: str, index: ShardIndex, cache: Path, ranks: Iterable[int], *, contents: bool = True
) -> dict[int, Path]:
    """The folders of these ranks' pieces; `contents`: every byte is checked."""
    run, _, step = uri.rstrip("/").rpartition("/checkpoints/")
    folders: dict[int, Path] = {}
    for rank in ranks:
        place = join_uri(run, f"shards/{step}/rank-{rank:05d}")
        try:
            folders[rank] = fetch_folder(place, cache, contents=contents)
        except NotFoundError as problem:
            raise CorruptDataError(uri, f"the piece of rank {rank} is gone ({problem})") from None
        manifest = read_manifest(open_store(place))
        if manifest is None or manifest.digest != index.digests[rank]:
            raise CorruptDataError(uri, f"the piece of rank {rank} belongs to another checkpoint")
    return folders


def open_whole(uri: str, folder: Path, cache: Path) -> dict[str, Tensor] | None:
    """Weights of a checkpoint in pieces, whole and by the model's own names; None when it is an ordinary folder."""
    index = ShardIndex.read(folder)
    if index is None:
        return None
    return model_names(read_whole(index, _fetch_pieces(uri, index, cache, range(index.num_ranks)))[0])


def _set_rng(states: Mapping[str, Tensor]) -> None:
    """This rank's random generators as they were, when it had as many partners."""
    ranks = {name.split("/")[0] for name in states}
    if len(ranks) != dist.get_world_size():
        return
    mine = f"{dist.get_rank():05d}"
    torch.set_rng_state(states[f"{mine}/cpu"])
    if f"{mine}/cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[f"{mine}/cuda"])


def list_checkpoints(output: str) -> list[str]:
    """URIs of a run's checkpoints, newest first."""
    store = open_store(f"{output.rstrip('/')}/checkpoints")
    steps = {file.path.split("/")[0] for file in store.list()}
    uris = [f"{store.uri.rstrip('/')}/{step}" for step in sorted(steps, reverse=True) if step.startswith("step-")]
    # A step whose upload was cut off has files but no manifest: it is not there.
    return [uri for uri in uris if is_published(uri)]


def clear_checkpoints(output: str) -> int:
    """Remove every checkpoint of a run that starts over; how many there were."""
    steps = list_steps(output)
    for step in steps:
        for kind in ("checkpoints", "shards"):
            remove_folder(join_uri(output, f"{kind}/step-{step:08d}"))
    return len(steps)


def list_steps(output: str) -> list[int]:
    """Steps done at a run's checkpoints, newest first."""
    return [int(uri.rpartition("-")[2]) for uri in list_checkpoints(output)]


def newest_step(output: str) -> int:
    """Steps done at a run's newest checkpoint; 0 when there is none."""
    return next(iter(list_steps(output)), 0)


def on_every_rank(act: Callable[[], None]) -> None:
    """Run `act` on every rank; when it fails on one, all raise its error."""
    problem: FarspanError | None = None
    try:
        act()
    except FarspanError as found:
        problem = found
    except Exception as found:
        problem = TrainingError(f"rank {dist.get_rank()} failed: {type(found).__name__}: {found}")
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for problem in problems:
        if problem is not None:
            raise problem


def of_all_ranks(mine: Result) -> list[Result]:
    """What every rank says, by rank. Collective."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


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
            state = TrainState(**json.loads((folder / STATE).read_text(encoding="utf-8")))
            index = ShardIndex.read(folder)
            if index is not None:
                _fetch_pieces(uri, index, cache, range(index.num_ranks))
            rng = load_file(folder / RNG) if (folder / RNG).is_file() else {}
        except (CorruptDataError, NotFoundError) as problem:
            skipped.append(f"checkpoint passed over: {problem}")
            continue
        state.refuse_other_run(now)
        return folder, Resumed(state, tuple(skipped), uri, rng)
    return None


def model_names(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


def _read_weights(folder: Path, engine: WeightsEngine, adapter: Adapter | None) -> dict[str, Tensor]:
    if is_adapter_folder(folder) != (adapter is not None):
        raise _other_content(adapter)
    if adapter is not None:
        return {f"model.{name}": tensor for name, tensor in load_adapter(folder, adapter).items()}
    # Through transformers, which renames some models' weights when it saves and back when it loads.
    dtype = torch.promote_types(next(engine.module.parameters()).dtype, torch.float32)
    return {f"model.{name}": tensor for name, tensor in load_causal_lm(folder, dtype).state_dict().items()}


def _other_content(adapter: Adapter | None) -> CheckpointError:
    was, is_now = ("an adapter", "every weight") if adapter is None else ("every weight", "an adapter")
    return CheckpointError(
        "lora.rank",
        f"the checkpoint holds {was}, this run trains {is_now}; "
        "restore it, choose another output, or set train.resume=false",
    )
