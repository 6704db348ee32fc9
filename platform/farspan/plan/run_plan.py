"""What a run will do and cost, in plain numbers, before anything is started. Pure.

Letters: R = sp ranks of one sequence, t tokens a rank holds, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from farspan.config.schema import RunConfig
from farspan.errors import ConfigError
from farspan.plan.facts import ModelFacts

_STATE_BYTES_PER_PARAMETER = 4 + 4 + 4  # fp32 weight and AdamW's two moments
_GRADIENT_BYTES_PER_PARAMETER = 4


@dataclass(frozen=True, slots=True)
class RunPlan:
    """One legal way to run a config, and its costs per process."""

    dp: int
    sp: int
    shard_tokens: int
    tokens_per_step: int
    num_parameters: int
    q_heads_per_rank: int
    kv_head_copies: int
    state_bytes: int
    gradient_bytes: int
    loss_tile_bytes: int
    exchange_bytes_per_step: int

    def lines(self) -> list[tuple[str, str]]:
        """The plan for a reader: (what, how much and why)."""
        rows = [
            ("model", f"{self.num_parameters / 1e6:.1f} M parameters"),
            ("mesh", f"dp {self.dp} x sp {self.sp}: {self.dp} sequences side by side, each on {self.sp} processes"),
            ("tokens", f"{self.shard_tokens} of a sequence per process, {self.tokens_per_step} per step in all"),
            ("weights + AdamW", f"{_mib(self.state_bytes)} per process, sharded over all {self.dp * self.sp}"),
            ("gradients", f"{_mib(self.gradient_bytes)} per process"),
            ("logits", f"{_mib(self.loss_tile_bytes)} per loss tile, never the whole sequence"),
            ("exchange", f"{_mib(self.exchange_bytes_per_step)} sent per process and step by attention"),
        ]
        if self.kv_head_copies > 1:
            rows.append(("kv heads", f"each sent {self.kv_head_copies} times: fewer of them than processes"))
        return rows


def plan_run(config: RunConfig, facts: ModelFacts, compute_bytes: int) -> RunPlan:
    """The plan of `config`; `compute_bytes` is the size of one number in the compute type.

    Raises:
        ConfigError: the model's heads cannot be cut that way.
    """
    sp, dp = config.parallel.sp, config.parallel.workers // config.parallel.sp
    if facts.num_q_heads % sp != 0:
        legal = max(d for d in range(1, sp + 1) if facts.num_q_heads % d == 0 and config.parallel.workers % d == 0)
        raise ConfigError(
            "parallel.sp",
            f"must divide the model's {facts.num_q_heads} query heads for strategy=ulysses",
            sp,
            f"use parallel.sp={legal}",
        )
    widths = 2 if config.model.dtype == "float64" else 1
    shard_tokens = config.data.sequence_tokens // sp
    return RunPlan(
        dp=dp,
        sp=sp,
        shard_tokens=shard_tokens,
        tokens_per_step=config.data.sequence_tokens * dp * config.train.accumulation,
        num_parameters=facts.num_parameters,
        q_heads_per_rank=facts.num_q_heads // sp,
        kv_head_copies=math.lcm(facts.num_kv_heads, sp) // facts.num_kv_heads,
        state_bytes=_STATE_BYTES_PER_PARAMETER * widths * facts.num_parameters // config.parallel.workers,
        gradient_bytes=_GRADIENT_BYTES_PER_PARAMETER * widths * facts.num_parameters // config.parallel.workers,
        loss_tile_bytes=min(config.train.loss_tile_tokens, shard_tokens) * facts.vocab_size * 4 * widths,
        exchange_bytes_per_step=ulysses_bytes(facts, shard_tokens, sp, compute_bytes, recompute=config.train.recompute)
        * config.train.accumulation,
    )


def ulysses_bytes(facts: ModelFacts, shard_tokens: int, sp: int, compute_bytes: int, *, recompute: bool) -> int:
    """Bytes one rank sends for one sequence: q, k, v there and out back, in every layer, forward and backward."""
    kv_heads = math.lcm(facts.num_kv_heads, sp)
    heads = facts.num_q_heads + 2 * kv_heads + facts.num_q_heads
    passes = 3 if recompute else 2
    per_pass = shard_tokens * heads * facts.head_dim * compute_bytes * (sp - 1) // sp
    return passes * facts.num_layers * per_pass


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
