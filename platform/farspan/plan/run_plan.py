"""What a run will do and cost, in plain numbers, before anything is started. Pure.

The bytes of each strategy are formulas of the room that sends them (farspan/parallel).
"""

from __future__ import annotations

from dataclasses import dataclass

from farspan.config.schema import ParallelConfig, RunConfig
from farspan.errors import ConfigError
from farspan.parallel.heads import HeadPlan, plan_heads
from farspan.parallel.strategy import choose_layout
from farspan.plan.choose import choose_parallel
from farspan.plan.facts import ModelFacts
from farspan.plan.hybrid import hybrid_plan
from farspan.plan.sent import exchange_bytes
from farspan.plan.tiers import Given
from farspan.plan.weights import weights_bytes

# How chunks are drawn, by memory.chunk_sampling.
_DRAWN = {
    "independent": ", each drawn with probability {keep:g}",
    "importance": ", {keep:g} of them drawn on average, those with more labels more often",
    "without_replacement": ", {keep:g} of them drawn without replacement (gradients are biased)",
}


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
    num_trained: int
    heads: HeadPlan
    q_heads_per_rank: int
    kv_head_copies: int
    state_bytes: int
    gradient_bytes: int
    loss_tile_bytes: int
    exchange_bytes_per_step: int
    parallel: ParallelConfig
    """The run's, its strategy named."""
    host_bytes: int = 0
    cut: str = "sharded"
    reason: str | None = None
    """Why that strategy, where the config left it open."""
    recurrent: str | None = None
    """How layers without attention are shared, where there are any."""
    hybrid: tuple[tuple[str, str], ...] = ()
    """Lines that take the place of a mesh's, where documents have ranks of their own."""
    memory: str | None = None
    """What is done to need less memory, where anything is."""
    tiers: tuple[Given, ...] = ()
    """Where what does not lie on the device lies."""
    unmeasured: tuple[str, ...] = ()
    """Tiers whose speed decides and is not known yet."""

    def lines(self) -> list[tuple[str, str]]:
        """The plan for a reader: (what, how much and why)."""
        rows = [
            ("model", f"{self.num_parameters / 1e6:.1f} M parameters"),
            ("mesh", f"dp {self.dp} x sp {self.sp}: {self.dp} sequences side by side, each on {self.sp} processes"),
            ("tokens", f"{self.shard_tokens} of a sequence per process, {self.tokens_per_step} per step in all"),
            ("attention", f"{self.strategy}, {self.layout} layout, {self.q_heads_per_rank} query heads per process"),
            ("weights + AdamW", f"{_mib(self.state_bytes)} per process, {self.cut} over all {self.dp * self.sp}"),
            ("gradients", f"{_mib(self.gradient_bytes)} per process"),
            ("logits", f"{_mib(self.loss_tile_bytes)} per loss tile, never the whole sequence"),
            ("exchange", f"{_mib(self.exchange_bytes_per_step)} sent per process and step by attention"),
        ]
        if self.num_trained < self.num_parameters:
            rows.insert(1, ("LoRA", f"{self.num_trained / 1e6:.2f} M parameters trained beside the frozen model"))
        if self.host_bytes > 0:
            rows.append(("host memory", f"{_mib(self.host_bytes)} per process of weights + AdamW"))
        if self.kv_head_copies > 1:
            rows.append(
                ("kv heads", f"each sent {self.kv_head_copies} times, so that every process has those it reads")
            )
        notes = (("memory", self.memory), ("strategy", self.reason), ("recurrent", self.recurrent))
        rows += [(what, text) for what, text in notes if text]
        rows += [(given.kind.name, given.text()) for given in self.tiers]
        if self.unmeasured:
            names = " and ".join(self.unmeasured)
            rows.append(("tiers", f"the speed of {names} is measured when the run starts, and decides their shares"))
        rows = [(what, dict(self.hybrid).get(what, text)) for what, text in rows]
        rows += [row for row in self.hybrid if row[0] not in dict(rows)]
        padded = self.heads.q_heads - self.heads.num_q_heads
        if padded > 0:
            rows.append(("query heads", f"{padded} of {self.heads.q_heads} are padding: heads do not divide evenly"))
        return rows


def plan_run(config: RunConfig, facts: ModelFacts, compute_bytes: int, num_adapter: int = 0) -> RunPlan:
    """The plan of `config`; `compute_bytes` is the size of one number in the compute type.

    `num_adapter` are the parameters trained in place of the model's own; 0: those are trained.

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
    chosen = choose_parallel(config, facts, compute_bytes)
    parallel = chosen.parallel
    sp, dp, strategy = parallel.sp, parallel.workers // parallel.sp, parallel.strategy
    # Processes that exchange heads, and those that a ring (or a gathering of keys) is made of.
    inner = {"ulysses": sp, "hybrid": parallel.ulysses}.get(strategy, 1)
    heads = plan_heads(facts.num_q_heads, facts.num_kv_heads, inner)
    num_ring = sp // parallel.ulysses if strategy == "hybrid" else sp
    widths = 2 if config.model.dtype == "float64" else 1
    num_frozen, num_trained = (facts.num_parameters, num_adapter) if num_adapter else (0, facts.num_parameters)
    hybrid = hybrid_plan(config, parallel, facts, compute_bytes, num_trained) if parallel.hdp else None
    workers, optimizer = config.parallel.workers, config.optim.kind
    kept = weights_bytes(config.weights, num_frozen, num_trained, workers, compute_bytes, optimizer)
    shard_tokens = config.data.sequence_tokens // sp
    return RunPlan(
        dp=dp,
        sp=sp,
        strategy=strategy,
        layout=choose_layout(strategy, parallel.layout, num_ring),
        shard_tokens=shard_tokens,
        tokens_per_step=config.data.sequence_tokens * dp * config.train.accumulation,
        num_parameters=num_frozen + num_trained,
        num_trained=num_trained,
        heads=heads,
        q_heads_per_rank=heads.q_heads // inner,
        kv_head_copies=heads.copies,
        state_bytes=kept.state,
        gradient_bytes=kept.gradient,
        loss_tile_bytes=min(config.train.loss_tile_tokens, shard_tokens) * facts.vocab_size * 4 * widths,
        exchange_bytes_per_step=hybrid.most_sent_bytes
        if hybrid
        else exchange_bytes(config, parallel, facts, compute_bytes),
        host_bytes=kept.host,
        cut="sharded" if config.weights.engine == "fsdp2" else f"ZeRO-{config.weights.zero}",
        parallel=parallel,
        reason=chosen.reason,
        recurrent=_recurrent(facts, sp),
        hybrid=hybrid.lines() if hybrid else (),
        memory=_levers(config),
    )


def passes_of(config: RunConfig) -> int:
    """Most sequences that come one after the other on a process in a step.

    Two stand for any number of them: hybrid data parallelism deals as it needs, and so does a run that may shrink.
    """
    parallel = config.parallel
    deals = parallel.hdp or (parallel.min_workers or parallel.workers) < parallel.workers
    return max(config.train.accumulation, 2 if deals else 1)


def _levers(config: RunConfig) -> str | None:
    """What this run does to need less memory, and where things lie; a tier that is emulated is called so."""
    memory, chunked = config.memory, config.memory.chunk != "none"
    parts = []
    if chunked:
        drawn = _DRAWN[memory.chunk_sampling].format(keep=memory.chunk_keep) if memory.chunk == "spaco" else ""
        parts.append(f"{memory.chunk} by chunks of {memory.chunk_tokens} tokens{drawn}")
    if memory.offload_activations != "none":
        kind = {"cpu": "dram"}.get(memory.offload_activations, memory.offload_activations)
        named = [f"{t} (emulated)" if ":emulated:" in t else t for t in memory.tiers if t.startswith(f"{kind}:")]
        what = "keys and values of all chunks" if chunked else "tensors kept for backward"
        where = "where room and speeds decide" if kind == "auto" else f"in {' + '.join(named) or 'host memory'}"
        parts.append(f"{what} {where}")
    if memory.tiled_mlp:
        tokens = memory.mlp_tile_tokens or "as many"
        wide = "" if memory.mlp_tile_tokens else " as the model is wide"
        parts.append(f"feed-forward layers and normalizations by tiles of {tokens} tokens{wide}")
    if config.train.recompute:
        parts.append("layers computed again in backward")
    if isinstance(memory.swap_share, str):
        parts.append("products of as many tokens as copies can hide wait there instead (measured when the run starts)")
    elif memory.swap_share > 0:
        parts.append(f"products of {memory.swap_share:.0%} of the tokens wait there instead")
    if config.optim.kind == "adamw8bit":
        parts.append("optimizer states in 8 bits")
    if config.weights.offload_optimizer != "none":
        parts.append("optimizer states in host memory")
    return "; ".join(parts) or None


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
