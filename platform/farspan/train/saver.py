"""Writing checkpoints: a copy at a step boundary, and its publication at once or behind the steps that follow.

In the background each rank publishes its own piece, `<output>/shards/step-00000050/rank-00000/`; when all are there,
rank 0 publishes `<output>/checkpoints/step-00000050/`, which names them by their hashes. Only then is the checkpoint
there. The ranks' threads meet over a key-value store: a collective beside the main thread's would mix with it.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from farspan.config.load import dump_config
from farspan.config.schema import RunConfig
from farspan.errors import FarspanError, StorageError, TrainingError
from farspan.models.checkpoint import save_causal_lm
from farspan.models.lora import Adapter, save_adapter
from farspan.storage.paths import join_uri
from farspan.storage.patience import patiently
from farspan.storage.publish import publish_folder
from farspan.telemetry.events import CheckpointPublished, EventBody, Note
from farspan.train.checkpoint import CONFIG, OPTIMIZER, PLAN, RNG, STATE, TrainState, list_steps, model_names, on_rank_0
from farspan.train.rescue import clear_rescue
from farspan.train.retention import remove_expired
from farspan.train.shards import SHARDS, Piece, ShardIndex, copy_piece
from farspan.train.weights import WeightsEngine
from farspan.verify.certificate import CERTIFICATE

_LOOK_EVERY_S, _PATIENCE = 0.05, 6


class Board(Protocol):
    """A key-value store that every rank reaches: torch's `Store`."""

    def set(self, key: str, value: str) -> None: ...

    def check(self, keys: list[str]) -> bool: ...

    def get(self, key: str) -> bytes: ...


@dataclass
class Whole:
    """Everything on rank 0, as an ordinary Hugging Face folder with the optimizer's states beside it."""

    weights: dict[str, Tensor]
    states: dict[str, Tensor]


@dataclass
class Copy:
    """What a checkpoint holds, out of the way of the next step."""

    state: TrainState
    content: Whole | Piece
    rng: dict[str, Tensor]
    started_s: float


@dataclass
class Saver:
    """The checkpoints of one run on one rank. Every public call but `trouble` and `news` is collective."""

    config: RunConfig
    engine: WeightsEngine
    tokenizer: PreTrainedTokenizerBase
    board: Board
    certificate: str | None = None
    adapter: Adapter | None = None
    plan: str = ""
    _thread: threading.Thread | None = None
    _problem: FarspanError | None = None
    _news: list[EventBody] = field(default_factory=list)

    @property
    def in_background(self) -> bool:
        return self.config.train.checkpoint_async

    def save(self, state: TrainState) -> None:
        """Publish a checkpoint of this boundary; in the background, once the one before is there.

        Raises:
            FarspanError: this one, or the one before, could not be published.
        """
        self.finish()
        copy = self._copy(state)
        if not self.in_background:
            published = on_rank_0(lambda: self._publish_now(copy))
            self._news.extend(published)
            return
        self._thread = threading.Thread(target=self._behind, args=(copy,), name="farspan-checkpoint", daemon=True)
        self._thread.start()

    def trouble(self) -> FarspanError | None:
        """What went wrong behind this rank's back."""
        return self._problem

    def news(self) -> list[EventBody]:
        """What was published since it was last asked; of the background only rank 0 knows."""
        news, self._news = self._news, []
        return news

    def finish(self) -> None:
        """Wait until the pending checkpoint is there; every rank raises when it cannot be."""
        if not self.in_background:
            return
        if self._thread is not None:
            # Every wait inside it has a deadline of its own; this is for what none of them foresaw.
            self._thread.join(timeout=2 * _PATIENCE * self.config.resources.timeout_s)
            if self._thread.is_alive():
                self._problem = StorageError(self.config.output, "a checkpoint did not end; raise resources.timeout_s")
            self._thread = None
        problems: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, self._problem)
        for problem in problems:
            if problem is not None:
                raise problem

    def _copy(self, state: TrainState) -> Copy:
        started = time.perf_counter()
        held = self.engine.held() if self.in_background and self.adapter is None else {}
        rng = _gathered_rng()
        if held:
            piece = copy_piece(self.engine.module, held, dist.get_rank(), dist.get_world_size())
            return Copy(state, piece, rng, started)
        weights = self.engine.whole_weights(trained_only=self.adapter is not None)
        return Copy(state, Whole(weights, self.engine.whole_states()), rng, started)

    def _publish_now(self, copy: Copy) -> list[EventBody]:
        self._publish(copy, None)
        return self.news()

    def _behind(self, copy: Copy) -> None:
        try:
            index = self._publish_piece(copy) if isinstance(copy.content, Piece) else None
            if dist.get_rank() == 0:
                self._publish(copy, index)
            else:
                # So that all are done at about the same time, and nobody waits long inside a collective.
                self._wait_for(_ended(copy.state.step), f"the checkpoint of step {copy.state.step}")
        except FarspanError as problem:
            self._problem = problem
        except Exception as problem:
            what = f"the checkpoint of step {copy.state.step} failed: {type(problem).__name__}: {problem}"
            self._problem = TrainingError(what)
        finally:
            if dist.get_rank() == 0:
                self.board.set(_ended(copy.state.step), "ended")

    def _publish_piece(self, copy: Copy) -> ShardIndex | None:
        """Publish this rank's piece; on rank 0 also wait for the others': gives the index of them all."""
        rank, piece, step = dist.get_rank(), copy.content, copy.state.step
        assert isinstance(piece, Piece)
        place = join_uri(self.config.output, f"shards/step-{step:08d}/rank-{rank:05d}")
        outcome = "failed"
        try:
            with tempfile.TemporaryDirectory(prefix="farspan-shard-") as scratch:
                folder = Path(scratch) / "piece"
                piece.write(folder)
                outcome = self._patiently(lambda: publish_folder(folder, place, frozen=True).digest)
        finally:
            self.board.set(_key(step, rank), outcome)
        if rank != 0:
            return None
        digests = [self._outcome_of(step, other) for other in range(dist.get_world_size())]
        return ShardIndex(dist.get_world_size(), piece.rows, piece.whole, digests)

    def _outcome_of(self, step: int, rank: int) -> str:
        self._wait_for(_key(step, rank), f"rank {rank}'s piece of step {step}")
        outcome = self.board.get(_key(step, rank)).decode()
        if outcome == "failed":
            raise StorageError(self.config.output, f"rank {rank} could not publish its piece of step {step}")
        return outcome

    def _wait_for(self, key: str, what: str) -> None:
        # Much longer than one transfer may stall: a large piece takes its time.
        ends = time.monotonic() + _PATIENCE * self.config.resources.timeout_s
        while not self.board.check([key]):
            if time.monotonic() > ends:
                raise StorageError(self.config.output, f"{what} was not published in time; raise resources.timeout_s")
            time.sleep(_LOOK_EVERY_S)

    def _publish(self, copy: Copy, index: ShardIndex | None) -> None:
        """The folder that makes the checkpoint visible. Rank 0 only."""
        uri = join_uri(self.config.output, f"checkpoints/step-{copy.state.step:08d}")
        with tempfile.TemporaryDirectory(prefix="farspan-checkpoint-") as scratch:
            folder = Path(scratch) / "checkpoint"
            folder.mkdir()
            self._write(folder, copy, index)
            num_bytes = self._patiently(lambda: publish_folder(folder, uri, frozen=True).num_bytes)
        if isinstance(copy.content, Piece):
            num_bytes += dist.get_world_size() * sum(t.nbytes for t in copy.content.tensors.values())
        seconds = time.perf_counter() - copy.started_s
        self._news.append(CheckpointPublished(step=copy.state.step, uri=uri, seconds=seconds, bytes=num_bytes))
        self._patiently(lambda: clear_rescue(self.config.output))
        self._forget_old()

    def _forget_old(self) -> None:
        train = self.config.train
        if train.keep_checkpoints > 0:
            steps = self._patiently(lambda: list_steps(self.config.output))
            if gone := self._patiently(lambda: remove_expired(self.config.output, train, steps)):
                listed = ", ".join(str(step) for step in sorted(gone))
                self._news.append(Note(text=f"checkpoint removed (train.keep_checkpoints): step {listed}"))

    def _write(self, folder: Path, copy: Copy, index: ShardIndex | None) -> None:
        content, config = copy.content, self.engine.module.model.config
        if isinstance(content, Whole):
            if self.adapter is None:
                save_causal_lm(folder, config, model_names(content.weights), self.tokenizer)
            else:
                save_adapter(folder, self.adapter, model_names(content.weights))
                self.tokenizer.save_pretrained(folder)
            save_file(content.states, folder / OPTIMIZER)
        else:
            assert index is not None, "pieces have an index"
            (folder / SHARDS).write_text(index.to_json(), encoding="utf-8")
            config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        save_file(copy.rng, folder / RNG)
        (folder / STATE).write_text(json.dumps(asdict(copy.state), indent=1), encoding="utf-8")
        (folder / CONFIG).write_text(dump_config(self.config), encoding="utf-8")
        if self.plan:
            (folder / PLAN).write_text(self.plan + "\n", encoding="utf-8")
        if self.certificate is not None:
            (folder / CERTIFICATE).write_text(self.certificate, encoding="utf-8")

    def _patiently(self, act: Callable[[], Any]) -> Any:
        # While rank 0 asks again, the others may wait for it inside a collective.
        return patiently(act, self.config.output, self.config.resources.timeout_s / 2)


def _key(step: int, rank: int) -> str:
    return f"farspan-checkpoint-{step}-{rank}"


def _ended(step: int) -> str:
    return f"farspan-checkpoint-{step}-ended"


def _gathered_rng() -> dict[str, Tensor]:
    """`<rank>/<device>` -> state of the random generators of every rank, a few kilobytes each. Collective."""
    mine = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        mine["cuda"] = torch.cuda.get_rng_state()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {f"{rank:05d}/{device}": t for rank, states in enumerate(everyone) for device, t in states.items()}
