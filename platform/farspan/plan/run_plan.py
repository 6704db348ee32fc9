"""What a run will do and cost, in plain numbers, before anything is started. Pure.

The bytes of each strategy are formulas of the room that sends them (farspan/parallel).
"""

from __future__ import annotations

from dataclasses import dataclass

from farspan.config.schema import RunConfig
from farspan.errors import ConfigError
from farspan.models.rules import LayerRule
from farspan.parallel import whole
from farspan.parallel.heads import HeadPlan, plan_heads
from farspan.parallel.strategy import bytes_sent, choose_layout, count_hops, lay_out
from farspan.parallel.traffic import Block
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
    sp, dp, strategy = config.parallel.sp, config.parallel.workers // config.parallel.sp, config.parallel.strategy
    # Processes that exchange heads, and those that a ring (or a gathering of keys) is made of.
    inner = {"ulysses": sp, "hybrid": config.parallel.ulysses}.get(strategy, 1)
    heads = plan_heads(facts.num_q_heads, facts.num_kv_heads, inner)
    num_ring = sp // config.parallel.ulysses if strategy == "hybrid" else sp
    widths = 2 if config.model.dtype == "float64" else 1
    shard_tokens = config.data.sequence_tokens // sp
    return RunPlan(
        dp=dp,
        sp=sp,
        strategy=strategy,
        layout=choose_layout(strategy, config.parallel.layout, num_ring),
        shard_tokens=shard_tokens,
        tokens_per_step=config.data.sequence_tokens * dp * config.train.accumulation,
        num_parameters=facts.num_parameters,
        heads=heads,
        q_heads_per_rank=heads.q_heads // inner,
        kv_head_copies=heads.copies,
        state_bytes=_STATE_BYTES_PER_PARAMETER * widths * facts.num_parameters // config.parallel.workers,
        gradient_bytes=_GRADIENT_BYTES_PER_PARAMETER * widths * facts.num_parameters // config.parallel.workers,
        loss_tile_bytes=min(config.train.loss_tile_tokens, shard_tokens) * facts.vocab_size * 4 * widths,
        exchange_bytes_per_step=_exchange_bytes(config, facts, shard_tokens, compute_bytes),
    )


def _exchange_bytes(config: RunConfig, facts: ModelFacts, shard_tokens: int, compute_bytes: int) -> int:
    """Bytes one rank sends for its sequences of one step, in every layer; recomputing a layer sends again."""
    parallel, heads = config.parallel, (facts.num_q_heads, facts.num_kv_heads)
    block = Block(shard_tokens, *heads, facts.head_dim, facts.head_dim, compute_bytes)
    num_tokens, ways = config.data.sequence_tokens, (parallel.sp, parallel.ulysses)
    # Hops follow from the layout and the layer's window; documents, known later, change nothing.
    layout = lay_out(parallel.strategy, parallel.layout, num_tokens, *ways, (0, num_tokens))
    forwards = 2 if config.train.recompute else 1
    attention = 0
    for rule in facts.attention_rules or (LayerRule(),) * (facts.num_layers - facts.num_recurrent_layers):
        hops = count_hops(parallel.strategy, layout, parallel.ulysses, rule.window, rule.chunk)
        layer = bytes_sent(parallel.strategy, block, *ways, hops)
        attention += forwards * layer.forward + layer.backward
    gather = whole.bytes_sent(block.num_tokens, facts.width, block.itemsize, parallel.sp)
    return config.train.accumulation * (attention + facts.num_recurrent_layers * (forwards + 1) * gather)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
