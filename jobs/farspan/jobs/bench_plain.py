"""The peer of `farspan bench train`: a bare loop of torch and transformers in a process of its own.

Nothing of farspan runs in it but the model's beginning, a function of (config, seed). It reads finished tokens from
memory, which costs it nothing, and stands still while it is not asked for a step. N steps of T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch

from farspan.batch import IGNORED_LABEL
from farspan.config.schema import OptimConfig
from farspan.jobs.guardian import Guardian
from farspan.models.checkpoint import make_config, random_causal_lm
from farspan.train.apart import apart, hear


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainRun:
    """What the loop is told. `tokens` is a folder of tokens.npy, labels.npy and positions.npy, each [N, T]."""

    tokens: Path
    architecture: str
    settings: dict[str, Any]
    seed: int
    threads: int
    optim: OptimConfig
    rates: tuple[float, ...]
    """Learning rate of each step."""
    noise: float = 0.0
    """Each weight begins as itself times 1 + this times a number of a normal distribution."""


class PlainLoop:
    """The loop, which takes a step when it is asked to."""

    def __init__(self, process: psutil.Process, hear: Callable[[], Any], guardian: Guardian) -> None:
        self.pid = process.pid
        self._process, self._hear, self._guardian = process, hear, guardian

    def step(self) -> tuple[float, float]:
        """(loss, seconds it took). Raises ClusterError: its process died, or gave no answer until the deadline."""
        started_s = time.monotonic()
        self._guardian.go_on([self._process])
        loss = self._hear()
        seconds = time.monotonic() - started_s
        self._guardian.stop([self._process])
        assert isinstance(loss, float), "the process sends its losses"
        return loss, seconds


@contextmanager
def plain_loop(run: PlainRun, deadline_s: float, guardian: Guardian) -> Iterator[PlainLoop]:
    """The loop over all its learning rates, made and standing still. Its process has ended afterwards.

    Raises:
        ClusterError: its process died, or gave no answer until the deadline, which is for each answer.
    """
    with apart(_in_process, (run,)) as (process, pipe):
        assert process.pid is not None, "it was started"

        def hear_loop() -> Any:
            return hear(process, pipe, "the plain loop", deadline_s)

        hear_loop()
        made = psutil.Process(process.pid)
        guardian.stop([made])
        yield PlainLoop(made, hear_loop, guardian)


def _in_process(pipe: Connection, run: PlainRun) -> None:
    torch.set_num_threads(run.threads)
    tokens_NT, labels_NT, positions_NT = (
        torch.from_numpy(np.load(run.tokens / f"{name}.npy", allow_pickle=False))
        for name in ("tokens", "labels", "positions")
    )
    model = random_causal_lm(make_config(run.architecture, run.settings, {}), run.seed)
    _disturb(model, run)
    model.train()
    optimizer = _adamw(model, run.optim)
    pipe.send("ready")
    for step, rate in enumerate(run.rates):
        # Positions that begin again tell transformers where documents begin.
        logits_1TV = model(
            input_ids=tokens_NT[step : step + 1], position_ids=positions_NT[step : step + 1], use_cache=False
        ).logits
        loss = torch.nn.functional.cross_entropy(logits_1TV[0], labels_NT[step], ignore_index=IGNORED_LABEL)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optim.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pipe.send(loss.item())


def _disturb(model: torch.nn.Module, run: PlainRun) -> None:
    generator = torch.Generator().manual_seed(run.seed + 1)
    with torch.no_grad():
        for weight in model.parameters() if run.noise else ():
            weight.mul_(1 + run.noise * torch.randn(weight.shape, generator=generator))


def _adamw(model: torch.nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    weights = list(model.parameters())
    groups = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    # The fastest that torch has.
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), fused=True)
