"""parallel.strategy=auto: which strategy, and why, from a model's heads and the bytes each strategy would send. Pure.

Letters: H query heads, G key/value heads, R ranks that share a sequence.
Exchanging heads sends least where heads divide, and every rank then computes all tokens of its own heads. A ring takes
any head count; it hides its hops behind computation, which needs scores to compute at every hop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from farspan.config.check import refuse_ragged_stripes
from farspan.config.schema import ParallelConfig, RunConfig
from farspan.parallel.heads import plan_heads
from farspan.parallel.strategy import bytes_sent
from farspan.parallel.traffic import Block
from farspan.plan.facts import ModelFacts


@dataclass(frozen=True, slots=True)
class NamedParallel:
    """A config whose strategy is named, and one sentence why; none where the user named it."""

    parallel: ParallelConfig
    reason: str | None = None


def choose_parallel(config: RunConfig, facts: ModelFacts, compute_bytes: int) -> NamedParallel:
    """`resolve_strategy` of a run: chunks are shared by exchanging heads."""
    if config.memory.chunk != "none" and config.parallel.strategy == "auto":
        return NamedParallel(replace(config.parallel, strategy="ulysses"), "ulysses: no ring passes over chunks")
    if config.parallel.hdp and config.parallel.strategy == "auto":
        return NamedParallel(replace(config.parallel, strategy="ring"), "ring: goes around any number of processes")
    return resolve_strategy(config.parallel, config.data.sequence_tokens, facts, compute_bytes)


def resolve_strategy(
    parallel: ParallelConfig, sequence_tokens: int, facts: ModelFacts, compute_bytes: int = 2
) -> NamedParallel:
    """`parallel` with its strategy named; what is not `auto` stays as it is.

    Raises:
        ConfigError: the named layout cannot cut these sequences.
    """
    if parallel.strategy != "auto":
        return NamedParallel(parallel)
    strategy, ulysses, reason = _by_heads(parallel.sp, sequence_tokens // parallel.sp, facts)
    named = replace(parallel, strategy=strategy, ulysses=ulysses)
    num_ring = parallel.sp // ulysses if strategy != "ulysses" else 1
    if parallel.layout == "auto" and num_ring > 1 and sequence_tokens % (2 * num_ring) != 0:
        named = replace(named, layout="document_zigzag")
        reason += f"; {sequence_tokens} tokens do not cut into {2 * num_ring} stripes, so documents are cut one by one"
    refuse_ragged_stripes(named, sequence_tokens)
    return NamedParallel(named, reason + _cost(named, sequence_tokens, facts, compute_bytes))


def _by_heads(num_ranks: int, shard_tokens: int, facts: ModelFacts) -> tuple[str, int, str]:
    heads, kv_heads = facts.num_q_heads, facts.num_kv_heads
    if num_ranks == 1:
        return "ulysses", 1, "one process holds the whole sequence"
    divides = [n for n in range(2, num_ranks + 1) if num_ranks % n == 0 and _spread_evenly(heads, kv_heads, n)]
    if num_ranks in divides:
        return "ulysses", 1, f"{heads} query heads spread evenly over {num_ranks} processes"
    if divides:
        inner = divides[-1]
        return "hybrid", inner, f"{heads} query heads spread evenly over {inner} of {num_ranks} processes, not over all"
    uneven = f"{heads} query heads spread evenly over no part of {num_ranks} processes"
    if facts.reach is not None and facts.reach <= shard_tokens:
        return "allgather", 1, f"{uneven}, and no layer sees further than {facts.reach} tokens: a ring had idle hops"
    if heads < 2 * kv_heads:
        return "tokenring", 1, f"{uneven}, and queries are fewer than keys and values ({heads} < 2 * {kv_heads})"
    return "ring", 1, f"{uneven}, and keys and values are fewer than queries (2 * {kv_heads} <= {heads})"


def _spread_evenly(heads: int, kv_heads: int, num_ranks: int) -> bool:
    return plan_heads(heads, kv_heads, num_ranks).q_heads == heads


def _cost(parallel: ParallelConfig, sequence_tokens: int, facts: ModelFacts, compute_bytes: int) -> str:
    """What the choice sends, beside a plain ring."""
    if parallel.sp == 1:
        return ""
    shard_tokens = sequence_tokens // parallel.sp
    block = Block(shard_tokens, facts.num_q_heads, facts.num_kv_heads, facts.head_dim, facts.head_dim, compute_bytes)
    sent = sum(bytes_sent(parallel.strategy, block, parallel.sp, parallel.ulysses))
    text = f" ({sent / 2**20:.1f} MiB per process and layer"
    if parallel.strategy == "ring":
        return text + ")"
    return f"{text}, a ring {sum(bytes_sent('ring', block, parallel.sp, 1)) / 2**20:.1f})"
