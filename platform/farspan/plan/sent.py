"""Bytes the ranks of a sequence send each other in one step, by the formulas of the rooms that send them. Pure."""

from __future__ import annotations

from farspan.config.schema import ParallelConfig, RunConfig
from farspan.models.rules import LayerRule
from farspan.parallel.strategy import bytes_sent, count_hops, lay_out
from farspan.parallel.traffic import Block, Traffic
from farspan.plan.facts import ModelFacts


def exchange_bytes(config: RunConfig, parallel: ParallelConfig, facts: ModelFacts, compute_bytes: int) -> int:
    """Bytes one rank sends for its sequences of one step, in every layer; recomputing a layer sends again.

    For chunks over gathered keys it is the most: chunks of other documents are not gathered.
    """
    forwards = 2 if config.train.recompute else 1
    shard_tokens = config.data.sequence_tokens // parallel.sp
    recurrent = sum(mixer.bytes_sent(shard_tokens, compute_bytes, parallel.sp) for mixer in facts.recurrent_layers)
    if config.memory.chunk == "none":
        attention = _at_once(config, parallel, facts, compute_bytes)
    else:
        num_attention = facts.num_layers - len(facts.recurrent_layers)
        attention = num_attention * _by_chunks(config, parallel, facts, compute_bytes)
    return config.train.accumulation * (attention + (forwards + 1) * recurrent)


def _at_once(config: RunConfig, parallel: ParallelConfig, facts: ModelFacts, compute_bytes: int) -> int:
    """All layers. Hops follow from the layout and the layer's window; documents, known later, change nothing."""
    num_tokens, ways = config.data.sequence_tokens, (parallel.sp, parallel.ulysses)
    layout = lay_out(parallel.strategy, parallel.layout, num_tokens, *ways, (0, num_tokens))
    forwards, total = 2 if config.train.recompute else 1, 0
    no_limits = (LayerRule(),) * (facts.num_layers - len(facts.recurrent_layers))
    for rule in facts.attention_rules or no_limits:
        hops = count_hops(parallel.strategy, layout, parallel.ulysses, rule.window, rule.chunk)
        layer = bytes_sent(parallel.strategy, _block(facts, num_tokens // parallel.sp, compute_bytes), *ways, hops)
        total += forwards * layer.forward + layer.backward
    return total


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
    return bytes_sent(parallel.strategy, _block(facts, num_tokens, compute_bytes), parallel.sp, parallel.ulysses)


def _block(facts: ModelFacts, num_tokens: int, compute_bytes: int) -> Block:
    heads = (facts.num_q_heads, facts.num_kv_heads)
    return Block(num_tokens, *heads, facts.head_dim, facts.head_dim, compute_bytes)
