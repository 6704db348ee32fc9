"""What a run with documents on ranks of their own (parallel.hdp) costs, in plain numbers. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from farspan.config.schema import ParallelConfig, RunConfig
from farspan.data.balance import Cost, Spill, least_ranks
from farspan.parallel.layout import DocumentZigzagLayout
from farspan.parallel.strategy import bytes_sent, count_hops
from farspan.parallel.traffic import Block
from farspan.plan.facts import ModelFacts
from farspan.storage.paths import join_uri

_LIMITED_BACKWARD = 3.5  # forward and backward of attention, in forwards
_MATRIX_BACKWARD = 3.0
# By parallel.hdp_cost.
_BALANCE = {
    "counted": "by operations of attention and matrices, counted by the model's config, not measured",
    "measured": "by seconds, measured before the first step; a run that goes on uses those in {file}",
}
HDP_COST = "hdp_cost.json"
_FIXED_TOKENS = 64  # a micro-batch's launches cost what the matrices cost of so many tokens


def rank_tokens(config: RunConfig) -> int:
    """Tokens of a micro-batch that one process holds."""
    return config.parallel.rank_tokens or config.data.sequence_tokens // config.parallel.sp


def document_cost(facts: ModelFacts) -> Cost:
    """Operations of forward and backward of a document: attention by its square, matrices by its length."""
    per_score = _LIMITED_BACKWARD * 4 * facts.num_q_heads * facts.head_dim
    quadratic, linear = 0.0, _MATRIX_BACKWARD * 2 * facts.num_parameters
    no_limits = (None,) * (facts.num_layers - len(facts.recurrent_layers))
    for reach in [rule.window or rule.chunk for rule in facts.attention_rules] or no_limits:
        # Causal: a token sees half of its document, or all that a window lets it.
        quadratic += per_score / 2 if reach is None else 0.0
        linear += 0.0 if reach is None else per_score * reach
    return Cost(quadratic, linear, _FIXED_TOKENS * linear)


def document_bytes(
    config: RunConfig, strategy: str, facts: ModelFacts, compute_bytes: int, tokens: int, num_ranks: int
) -> int:
    """Bytes each of `num_ranks` processes sends for a document of `tokens`, in every layer, forward and backward."""
    if num_ranks == 1:
        return 0
    forwards, share = 2 if config.train.recompute else 1, -(-tokens // num_ranks)
    whole = share * num_ranks
    layout = DocumentZigzagLayout(whole, num_ranks, (0, whole))
    block = Block(share, facts.num_q_heads, facts.num_kv_heads, facts.head_dim, facts.head_dim, compute_bytes)
    total = sum((forwards + 1) * mixer.bytes_sent(share, compute_bytes, num_ranks) for mixer in facts.recurrent_layers)
    rules = facts.attention_rules or (None,) * (facts.num_layers - len(facts.recurrent_layers))
    for rule in rules:
        window, chunk = (rule.window, rule.chunk) if rule is not None else (None, None)
        layer = bytes_sent(strategy, block, num_ranks, 1, count_hops(strategy, layout, 1, window, chunk))
        total += forwards * layer.forward + layer.backward
    return total


def spill_of(config: RunConfig, facts: ModelFacts) -> Spill | None:
    """The share a user lets leave; the last layer, which backward needs at once, stays."""
    if not config.parallel.spill:
        return None
    most = min(config.parallel.spill, 1 - 1 / facts.num_layers)
    return Spill(document_cost(facts), kept_bytes=1.0, bytes_per_s=math.inf, most=most)


@dataclass(frozen=True, slots=True)
class HybridPlan:
    """A step in which every document has its own processes."""

    strategy: str
    rank_tokens: int
    sequences: int
    sequence_tokens: int
    workers: int
    most_ranks: int
    most_document_bytes: int
    gathered_bytes: int
    balance: str = ""
    """By what processes are balanced."""

    @property
    def most_sent_bytes(self) -> int:
        """Bytes a process sends in a step of nothing but longest documents, on average over processes."""
        return self.sequences * self.most_ranks * self.most_document_bytes // self.workers

    def lines(self) -> tuple[tuple[str, str], ...]:
        longest, held = f"{self.most_ranks} processes" if self.most_ranks > 1 else "one process", self.rank_tokens
        step_tokens = self.sequences * self.sequence_tokens
        sent = f"{_mib(self.most_document_bytes)} of each process for the longest document"
        return (
            ("mesh", f"none: the documents of {self.sequences} sequences over {self.workers} processes"),
            ("tokens", f"at most {held} per process at a time, {step_tokens} per step in all"),
            ("attention", f"{self.strategy} among the processes of a document"),
            ("ranks", f"a document of s tokens is on ceil(s / {held}), the longest possible on {longest}"),
            ("balance", self.balance),
            ("exchange", f"nothing for documents of up to {held} tokens, {sent}"),
            ("gathered", f"{_mib(self.gathered_bytes)} more per process during a step: whole weights and gradients"),
        )


def hybrid_plan(
    config: RunConfig, parallel: ParallelConfig, facts: ModelFacts, compute_bytes: int, num_trained: int
) -> HybridPlan:
    """The plan of a checked config with parallel.hdp."""
    capacity, longest = rank_tokens(config), config.data.sequence_tokens
    ranks = least_ranks(longest, parallel.workers, capacity, spill_of(config, facts))
    sent = document_bytes(config, parallel.strategy, facts, compute_bytes, longest, ranks)
    return HybridPlan(
        strategy=parallel.strategy,
        rank_tokens=capacity,
        sequences=parallel.workers // parallel.sp * config.train.accumulation,
        sequence_tokens=longest,
        workers=parallel.workers,
        most_ranks=ranks,
        most_document_bytes=sent,
        # Whole weights as they compute, whole gradients as they are summed.
        gathered_bytes=facts.num_parameters * compute_bytes + num_trained * max(4, compute_bytes),
        balance=_BALANCE[parallel.hdp_cost].format(file=join_uri(config.output, HDP_COST)),
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
