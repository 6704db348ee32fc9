"""What a run will do and cost, in plain numbers, before anything is started. Pure.

The bytes of each strategy are formulas of the room that sends them (farspan/parallel).
"""

from __future__ import annotations

from dataclasses import dataclass

from farspan.config.schema import ParallelConfig, RunConfig
from farspan.errors import ConfigError
from farspan.parallel.heads import HeadPlan, plan_heads
from farspan.parallel.strategy import bytes_sent, choose_layout
from farspan.parallel.traffic import Block
from farspan.plan.choose import resolve_strategy
from farspan.plan.facts import ModelFacts

_STATE_BYTES_PER_PARAMETER = 4 + 4 + 4  # fp32 weight and AdamW's two moments
_GRADIENT_BYTES_PER_PARAMETER = 4


@dataclass(frozen=True, slots=True)
class RunPlan:
    """One legal way to run a config, and its costs per process."""

    dp: int
    sp: int
    strategy: str
    layout: str
    shard_tokens: int
    tokens_per_step: int
    num_parameters: int
    heads: HeadPlan
    q_heads_per_rank: int
    kv_head_copies: int
    state_bytes: int
    gradient_bytes: int
    loss_tile_bytes: int
    exchange_bytes_per_step: int
    parallel: ParallelConfig
    """The run's, its strategy named."""
    reason: str | None = None
    """Why that strategy, where the config left it open."""
    recurrent: str | None = None
    """How layers without attention are shared, where there are any."""

    def lines(self) -> list[tuple[str, str]]:
        """The plan for a reader: (what, how much and why)."""
        rows = [
            ("model", f"{self.num_parameters / 1e6:.1f} M parameters"),
            ("mesh", f"dp {self.dp} x sp {self.sp}: {self.dp} sequences side by side, each on {self.sp} processes"),
            ("tokens", f"{self.shard_tokens} of a sequence per process, {self.tokens_per_step} per step in all"),
            ("attention", f"{self.strategy}, {self.layout} layout, {self.q_heads_per_rank} query heads per process"),
            ("weights + AdamW", f"{_mib(self.state_bytes)} per process, sharded over all {self.dp * self.sp}"),
            ("gradients", f"{_mib(self.gradient_bytes)} per process"),
            ("logits", f"{_mib(self.loss_tile_bytes)} per loss tile, never the whole sequence"),
            ("exchange", f"{_mib(self.exchange_bytes_per_step)} sent per process and step by attention"),
        ]
        if self.kv_head_copies > 1:
            rows.append(
                ("kv heads", f"each sent {self.kv_head_copies} times, so that every process has those it reads")
            )
        rows += [(what, text) for what, text in (("strategy", self.reason), ("recurrent", self.recurrent)) if text]
        padded = self.heads.q_heads - self.heads.num_q_heads
        if padded > 0:
            rows.append(("query heads", f"{padded} of {self.heads.q_heads} are padding: heads do not divide evenly"))
        return rows


def plan_run(config: RunConfig, facts: ModelFacts, compute_bytes: int) -> RunPlan:
    """The plan of `config`; `compute_bytes` is the size of one number in the compute type.

    Raises:
        ConfigError: a sequence longer than the model's positions.
    """
    if facts.max_positions is not None and config.data.sequence_tokens > facts.max_positions:
        raise ConfigError(
            "data.sequence_tokens",
            f"must not exceed the model's max_position_embeddings ({facts.max_positions})",
            config.data.sequence_tokens,
            f"use data.sequence_tokens={facts.max_positions // config.parallel.sp * config.parallel.sp}",
        )
    chosen = resolve_strategy(config.parallel, config.data.sequence_tokens, facts, compute_bytes)
    parallel = chosen.parallel
    sp, dp, strategy = parallel.sp, parallel.workers // parallel.sp, parallel.strategy
    # Processes that exchange heads, and those that a ring (or a gathering of keys) is made of.
    inner = {"ulysses": sp, "hybrid": parallel.ulysses}.get(strategy, 1)
    heads = plan_heads(facts.num_q_heads, facts.num_kv_heads, inner)
    num_ring = sp // parallel.ulysses if strategy == "hybrid" else sp
    widths = 2 if config.model.dtype == "float64" else 1
    shard_tokens = config.data.sequence_tokens // sp
    return RunPlan(
        dp=dp,
        sp=sp,
        strategy=strategy,
        layout=choose_layout(strategy, parallel.layout, num_ring),
        shard_tokens=shard_tokens,
        tokens_per_step=config.data.sequence_tokens * dp * config.train.accumulation,
        num_parameters=facts.num_parameters,
        heads=heads,
        q_heads_per_rank=heads.q_heads // inner,
        kv_head_copies=heads.copies,
        state_bytes=_STATE_BYTES_PER_PARAMETER * widths * facts.num_parameters // config.parallel.workers,
        gradient_bytes=_GRADIENT_BYTES_PER_PARAMETER * widths * facts.num_parameters // config.parallel.workers,
        loss_tile_bytes=min(config.train.loss_tile_tokens, shard_tokens) * facts.vocab_size * 4 * widths,
        exchange_bytes_per_step=_exchange_bytes(config, parallel, facts, compute_bytes),
        parallel=parallel,
        reason=chosen.reason,
        recurrent=_recurrent(facts, sp),
    )


def _exchange_bytes(config: RunConfig, parallel: ParallelConfig, facts: ModelFacts, compute_bytes: int) -> int:
    """Bytes one rank sends for its sequences of one step, in every layer; recomputing a layer sends again."""
    heads, shard_tokens = (facts.num_q_heads, facts.num_kv_heads), config.data.sequence_tokens // parallel.sp
    block = Block(shard_tokens, *heads, facts.head_dim, facts.head_dim, compute_bytes)
    layer = bytes_sent(parallel.strategy, block, parallel.sp, parallel.ulysses)
    forwards = 2 if config.train.recompute else 1
    attention = (facts.num_layers - len(facts.recurrent_layers)) * (forwards * layer.forward + layer.backward)
    recurrent = sum(mixer.bytes_sent(block.num_tokens, compute_bytes, parallel.sp) for mixer in facts.recurrent_layers)
    return config.train.accumulation * (attention + (forwards + 1) * recurrent)


def _recurrent(facts: ModelFacts, num_ranks: int) -> str | None:
    """How many layers carry a state, and what each process computes of them."""
    if not facts.recurrent_layers:
        return None
    switched = [mixer.units for mixer in facts.recurrent_layers if mixer.units is not None]
    parts = []
    if switched:
        share = switched[0].units_per_rank(num_ranks)
        padding = share * num_ranks - switched[0].num_units
        spare = f", {padding} of {share * num_ranks} are padding" if padding else ""
        parts.append(f"{len(switched)} layers over all tokens with {share} of {switched[0].num_units} heads{spare}")
    gathered = [mixer.name for mixer in facts.recurrent_layers if mixer.units is None]
    if gathered:
        parts.append(
            f"{len(gathered)} layers over all tokens and heads on every process: how to cut {gathered[0]} is not known"
        )
    return "; ".join(parts)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
