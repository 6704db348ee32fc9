"""Bytes the ranks of a sequence send each other in one step, by the formulas of the rooms that send them. Pure."""

from __future__ import annotations

from farspan.config.schema import ParallelConfig, RunConfig
from farspan.parallel.strategy import bytes_sent
from farspan.parallel.traffic import Block, Traffic
from farspan.plan.facts import ModelFacts


def exchange_bytes(config: RunConfig, parallel: ParallelConfig, facts: ModelFacts, compute_bytes: int) -> int:
    """Bytes one rank sends for its sequences of one step, in every layer; recomputing a layer sends again.

    For chunks over gathered keys it is the most: chunks of other documents are not gathered.
    """
    forwards = 2 if config.train.recompute else 1
    num_attention = facts.num_layers - len(facts.recurrent_layers)
    shard_tokens = config.data.sequence_tokens // parallel.sp
    recurrent = sum(mixer.bytes_sent(shard_tokens, compute_bytes, parallel.sp) for mixer in facts.recurrent_layers)
    if config.memory.chunk == "none":
        layer = _of_layer(parallel, facts, shard_tokens, compute_bytes)
        attention = forwards * layer.forward + layer.backward
    else:
        attention = _by_chunks(config, parallel, facts, compute_bytes)
    return config.train.accumulation * (num_attention * attention + (forwards + 1) * recurrent)


def _by_chunks(config: RunConfig, parallel: ParallelConfig, facts: ModelFacts, compute_bytes: int) -> int:
    """One layer: every chunk but the last goes forward once more, before any goes backward."""
    forwards = 2 if config.train.recompute else 1
    size, end = config.memory.chunk_tokens, config.data.sequence_tokens
    chunks = [
        _of_layer(parallel, facts, (min(start + size, end) - start) // parallel.sp, compute_bytes)
        for start in range(0, end, size)
    ]
    total = 0
    for number, own in enumerate(chunks):
        # With all heads on every rank a chunk also gathers the keys of those before it.
        met = chunks[: number + 1] if parallel.strategy == "allgather" else [own]
        passes = forwards + (number + 1 < len(chunks))
        total += sum(passes * other.forward + other.backward for other in met)
    return total


def _of_layer(parallel: ParallelConfig, facts: ModelFacts, num_tokens: int, compute_bytes: int) -> Traffic:
    heads = (facts.num_q_heads, facts.num_kv_heads)
    block = Block(num_tokens, *heads, facts.head_dim, facts.head_dim, compute_bytes)
    return bytes_sent(parallel.strategy, block, parallel.sp, parallel.ulysses)
