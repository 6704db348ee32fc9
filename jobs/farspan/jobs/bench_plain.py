"""The peer of `farspan bench train`: a bare loop of torch and transformers in a process of its own.

Nothing of farspan runs in it but the model's beginning, a function of (config, seed). It reads finished tokens from
memory, which costs it nothing. N steps of T tokens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from farspan.batch import IGNORED_LABEL
from farspan.config.schema import OptimConfig
from farspan.models.checkpoint import make_config, random_causal_lm
from farspan.train.apart import ask_apart


@dataclass(frozen=True, slots=True)
class Course:
    """A run as it was."""

    losses: tuple[float, ...]
    ends_s: tuple[float, ...]
    """When each step had ended, on one clock."""

    def seconds_per_step(self, warm: int) -> float:
        """Mean of the steps after the first `warm`."""
        return (self.ends_s[-1] - self.ends_s[warm - 1]) / (len(self.ends_s) - warm)


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


def run_plain(run: PlainRun, deadline_s: float) -> Course:
    """The loop over all its learning rates.

    Raises:
        ClusterError: its process died, or gave no answer until the deadline.
    """
    found = ask_apart(_in_process, (run,), "the plain loop", deadline_s)
    assert isinstance(found, Course), "the process sends what it did"
    return found


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
    losses, ends_s = [], []
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
        losses.append(loss.item())
        ends_s.append(time.monotonic())
    pipe.send(Course(tuple(losses), tuple(ends_s)))


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
