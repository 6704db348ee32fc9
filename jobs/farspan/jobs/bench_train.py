"""`farspan bench train`: a whole training job against a bare torch and transformers loop, same tokens, same seed.

The job is what `farspan train` starts: a local Ray, Ray Train, one worker. Its speed is taken from when its steps are
told of, so that everything between steps counts. Job and loop take turns, a step each, and each stands still, Ray with
the job, while it is the other's turn: a machine whose speed drifts drifts for both. Who stands still ends with the
bench, however that ends (guardian.py).

Two right programs round differently, and training makes more of it. So that curves that part can be read, the plain
loop then runs once more from weights that differ by one rounding, and how far that takes it from itself is told.
"""

from __future__ import annotations

import logging
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]

from farspan.config.load import load_config
from farspan.config.schema import CorpusConfig, RunConfig
from farspan.data.corpus import build_corpus
from farspan.data.reader import Corpus, Reader, open_corpus
from farspan.jobs.bench_plain import PlainLoop, PlainRun, plain_loop
from farspan.jobs.guardian import Guardian, guardian
from farspan.jobs.launch import local_ray
from farspan.jobs.progress import StopWish
from farspan.jobs.train import run_training
from farspan.models.checkpoint import make_config, random_causal_lm
from farspan.telemetry.events import EventBody, StepReport
from farspan.train.step import learning_rate

logger = logging.getLogger(__name__)

GOAL_SPEED, GOAL_CURVE = 0.95, 1e-3
_SLACK_S = 1800.0
_ROUNDING = 1e-7
_TOLD_EVERY = 10


@dataclass(slots=True)
class Course:
    """A run as it was, step by step."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, loss: float, seconds: float) -> None:
        self.losses.append(loss)
        self.seconds.append(seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBench:
    """What is trained. The defaults are a Llama of 60 million weights on Python's own library."""

    minutes: float = 10.0
    """How long each of the two trains."""
    num_steps: int = 0
    """Their steps, instead of `minutes`; 0: as many as the plain loop does in that time."""
    width: int = 640
    layers: int = 10
    heads: int = 10
    vocab_size: int = 16384
    sequence_tokens: int = 2048
    threads: int = 2
    lr: float = 3e-4
    warmup_steps: int = 20
    seed: int = 0
    probe_steps: int = 4
    """Steps of the plain loop from which the number of steps is told."""
    goal_curve: float = GOAL_CURVE
    """How far apart the curves may be; beyond it the plain loop is held against itself too."""
    warm_steps: int = 3
    """Steps at the beginning of a run that its speed leaves out."""
    max_documents: int = 1500
    sources: tuple[str, ...] = field(default_factory=lambda: (sysconfig.get_path("stdlib"),))

    def settings(self) -> dict[str, Any]:
        """Fields of the transformers config."""
        return {
            "hidden_size": self.width,
            "intermediate_size": self.width * 27 // 10,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "tie_word_embeddings": True,
        }

    def run(self, corpus: str, output: Path, num_steps: int) -> RunConfig:
        """The job: fp32, one worker."""
        schedule = [f"optim.warmup_steps={self.warmup_steps}", f"optim.lr={self.lr}"]
        where = [f"data.corpus={corpus}", f"output={output}", f"data.sequence_tokens={self.sequence_tokens}"]
        size = [f"train.steps={num_steps}", f"resources.cpus_per_worker={self.threads}", f"seed={self.seed}"]
        # One tile, as much memory as the plain loop's logits: by smaller ones all but the last are computed twice.
        size += [f"train.loss_tile_tokens={self.sequence_tokens}"]
        model = [f"model.settings.{name}={value}" for name, value in self.settings().items()]
        return load_config(RunConfig, None, [*schedule, *where, *size, "model.dtype=float32", *model])


def bench_train(bench: TrainBench) -> list[dict[str, Any]]:
    """Rows: speed of both, their ratio, and how far apart their loss curves are.

    Raises:
        ClusterError: the plain loop died or hung.
        FarspanError: what stopped the job.
    """
    with tempfile.TemporaryDirectory(prefix="farspan-bench-") as scratch, guardian() as watching:
        return _Comparison(bench, Path(scratch), watching).rows()


class _Comparison:
    def __init__(self, bench: TrainBench, scratch: Path, watching: Guardian) -> None:
        self._bench, self._scratch, self._guardian = bench, scratch, watching
        self._uri = str(scratch / "corpus")
        build_corpus(
            CorpusConfig(
                sources=list(bench.sources),
                output=self._uri,
                vocab_size=bench.vocab_size,
                max_documents=bench.max_documents,
            ),
            lambda progress: None,
        )
        self._corpus = open_corpus(self._uri, scratch / "cache")

    def rows(self) -> list[dict[str, Any]]:
        bench, warm = self._bench, self._bench.warm_steps
        steps = bench.num_steps or self._steps_in_time()
        logger.info("%d steps of each, in turns", steps)
        plain, job = self._in_turns(steps)
        curve = curve_row(job.losses, plain.losses, self._num_weights(), bench.goal_curve)
        if "wrong" in curve:
            logger.info("the curves part; once more from weights one rounding away")
            own = self._plain_alone(steps, _ROUNDING)
            curve["plain's own, from weights one rounding away"] = _apart(own.losses, plain.losses)
        plain_s, job_s = plain.seconds[warm:], job.seconds[warm:]
        return [
            _contender_row("torch + transformers", bench.sequence_tokens, plain_s),
            _contender_row("farspan job", bench.sequence_tokens, job_s),
            speed_row(plain_s, job_s),
            curve,
        ]

    def _steps_in_time(self) -> int:
        probed = self._plain_alone(self._bench.probe_steps)
        per_step = min(probed.seconds[1:])
        logger.info("a step of the plain loop takes about %.2g s", per_step)
        return max(self._bench.warm_steps + 1, int(self._bench.minutes * 60 / per_step))

    def _in_turns(self, num_steps: int) -> tuple[Course, Course]:
        """(plain loop, job)"""
        config = self._bench.run(self._uri, self._scratch / "run", num_steps)
        plain, job, wish = Course(), Course(), StopWish()
        with self._loop(num_steps) as loop, local_ray(num_cpus=self._bench.threads):
            began_s = time.monotonic()

            def tell(body: EventBody) -> None:
                nonlocal began_s
                if not isinstance(body, StepReport):
                    return
                try:
                    with self._guardian.standing_still(_started_here({loop.pid, self._guardian.pid})):
                        job.add(body.loss, time.monotonic() - began_s)
                        plain.add(*loop.step())
                        if body.step % _TOLD_EVERY == 0:
                            times = plain.seconds[-1], job.seconds[-1]
                            logger.info("step %d: %.3g s, of the job %.3g s", body.step, *times)
                        began_s = time.monotonic()
                except BaseException:
                    # Nobody would hear of it before the job's last step.
                    wish.ask("the plain loop failed")
                    raise

            run_training(config, [], tell, wish, own_ray=True)
        return plain, job

    def _plain_alone(self, num_steps: int, noise: float = 0.0) -> Course:
        course = Course()
        with self._loop(num_steps, noise) as loop:
            for _ in range(num_steps):
                course.add(*loop.step())
        return course

    def _loop(self, num_steps: int, noise: float = 0.0) -> AbstractContextManager[PlainLoop]:
        bench, folder = self._bench, self._scratch / "tokens"
        write_tokens(self._corpus, folder, bench.sequence_tokens, bench.seed, num_steps)
        optim = bench.run(self._uri, folder, num_steps).optim
        run = PlainRun(
            tokens=folder,
            architecture="llama",
            settings=self._model_settings(),
            seed=bench.seed,
            threads=bench.threads,
            optim=optim,
            rates=tuple(learning_rate(optim, step, num_steps) for step in range(num_steps)),
            noise=noise,
        )
        return plain_loop(run, _SLACK_S, self._guardian)

    def _model_settings(self) -> dict[str, Any]:
        # What a run adds to a model made from scratch.
        fitting = {"max_position_embeddings": self._bench.sequence_tokens, "vocab_size": self._corpus.vocab_size}
        return {**self._bench.settings(), **fitting}

    def _num_weights(self) -> int:
        return random_causal_lm(make_config("llama", self._model_settings(), {}), 0).num_parameters()


def write_tokens(corpus: Corpus, folder: Path, sequence_tokens: int, seed: int, num_steps: int) -> None:
    """The sequences of the first steps, one a step, as plain arrays."""
    folder.mkdir(exist_ok=True)
    reader = Reader(corpus, sequence_tokens, seed)
    batches = [reader.batch(index) for index in range(num_steps)]
    for name in ("tokens", "labels", "positions"):
        np.save(folder / f"{name}.npy", np.stack([getattr(batch, f"{name}_T").numpy() for batch in batches]))


def _started_here(but: set[int]) -> list[psutil.Process]:
    """Every process this one has started, Ray's too, but some."""
    return [child for child in psutil.Process().children(recursive=True) if child.pid not in but]


def _contender_row(name: str, tokens: int, seconds: Sequence[float]) -> dict[str, Any]:
    return {"contender": name, "tokens_per_s": tokens / statistics.median(seconds), "steps": len(seconds)}


def speed_row(plain_s: Sequence[float], job_s: Sequence[float]) -> dict[str, Any]:
    """The job's speed over the plain loop's: all its steps, and the quarters of what single turns say."""
    ratio, turns = sum(plain_s) / sum(job_s), [a / b for a, b in zip(plain_s, job_s, strict=True)]
    low, middle, high = statistics.quantiles(turns, n=4) if len(turns) > 1 else (ratio, ratio, ratio)
    return {
        "what": "speed in turns",
        "farspan job / plain": ratio,
        "median turn": middle,
        "half of the turns": [low, high],
        "goal": GOAL_SPEED,
        "reached": ratio >= GOAL_SPEED,
    }


def curve_row(
    job: Sequence[float], plain: Sequence[float], num_weights: int, goal: float = GOAL_CURVE
) -> dict[str, Any]:
    """How far apart two loss curves are; `wrong` where they are not the same curve."""
    apart = _apart(job, plain)
    last = max(1, len(job) // 10)
    row = {
        "what": "loss curve",
        "weights": num_weights,
        "steps": len(job),
        "first loss": job[0],
        "job's loss at the end": statistics.fmean(job[-last:]),
        "plain's loss at the end": statistics.fmean(plain[-last:]),
        "largest difference": apart,
        "goal": goal,
    }
    # A NaN is never small enough.
    return row if apart <= goal else {**row, "wrong": f"the curves are {apart:.2g} apart"}


def _apart(a: Sequence[float], b: Sequence[float]) -> float:
    # NumPy's maximum keeps a NaN.
    return float(np.abs(np.subtract(a, b)).max())


def sized(width: int | None, layers: int | None, minutes: float | None) -> TrainBench:
    """The bench with what a user set."""
    usual = TrainBench()
    width, minutes = width or usual.width, usual.minutes if minutes is None else minutes
    return TrainBench(width=width, heads=max(1, width // 64), layers=layers or usual.layers, minutes=minutes)
