"""From what the ranks computed and what one process computed to a list of checks. Every number is kept.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from farspan.config.schema import ParallelConfig
from farspan.models.mixers import mixer_facts
from farspan.models.rules import layer_rules
from farspan.parallel.strategy import bytes_sent, count_hops, lay_out
from farspan.parallel.traffic import Block
from farspan.verify.cases import PACKED, SINGLE, Case, document_of, num_tokens
from farspan.verify.probe import RankAnswer
from farspan.verify.reference import StepAnswer, gradient_error

# fp64 on both sides, and the same arithmetic for every token.
ALLOWED = 1e-9
# Sums over shards run in another order than in one process: so much room on what reordering does there.
_ROUNDINGS = 30
# Where that is more than fp64's, the model computes in fp32 inside, and a few units of that are never a fault.
_FP64_ROUNDING, _FP32_UNITS = 1e-12, 1e-6
_ALLOWED_AT_MOST = 1e-4
_FP64_BYTES = 8


@dataclass(frozen=True, slots=True)
class Check:
    """One number and its bound; `about` names the worst place."""

    name: str
    measured: float
    allowed: float
    about: str = ""

    @property
    def passed(self) -> bool:
        # A NaN is not below anything.
        return self.measured <= self.allowed


@dataclass(frozen=True)
class Reference:
    """One process's answers, and how much its gradients differ from themselves summed in another order."""

    logits: dict[str, Tensor]
    steps: dict[str, StepAnswer]
    rounding: float


def judge(
    answers: Sequence[RankAnswer],
    reference: Reference,
    cases: Sequence[Case],
    parallel: ParallelConfig,
    small: PreTrainedModel,
) -> tuple[Check, ...]:
    """Every check of an examination."""
    first = answers[0]
    checks = [
        Check(f"logits, {name}", relative(first.logits[name], reference.logits[name]), ALLOWED)
        for name in (PACKED, SINGLE)
    ]
    allowed = gradients_allowed(reference.rounding)
    for case in cases:
        got, want = first.steps[case.name], reference.steps[case.name]
        checks.append(Check(f"loss, {case.name}", abs(got.loss - want.loss) / abs(want.loss), ALLOWED))
        checks.append(_gradients(f"gradients, {case.name}", got.gradients, want.gradients, allowed))
    packed = next(case for case in cases if case.name == PACKED)
    checks += _leaks(first, packed)
    if parallel.sp > 1:
        checks.append(_bytes(answers, parallel, small))
    return tuple(checks)


def gradients_allowed(rounding: float) -> float:
    """The bound for gradients of a model whose plain process differs from itself by `rounding`."""
    least = _FP32_UNITS if rounding > _FP64_ROUNDING else ALLOWED
    return min(max(least, _ROUNDINGS * rounding), _ALLOWED_AT_MOST)


def relative(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value wanted; NaN where there is one."""
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))


def _gradients(name: str, got: dict[str, Tensor], want: dict[str, Tensor], allowed: float) -> Check:
    if got.keys() != want.keys():
        return Check(name, float("inf"), allowed, f"other weights: {sorted(got.keys() ^ want.keys())[0]}")
    error, worst = gradient_error(got, want)
    return Check(name, error, allowed, worst)


def _leaks(answer: RankAnswer, packed: Case) -> list[Check]:
    """What one changed token changes: its own position, and nothing outside its document or before it."""
    before_TV = answer.logits[PACKED]
    scale = before_TV.abs().max()
    changed, unseen = 0, 0
    for at, after_TV in answer.leaks.items():
        _, end = document_of(packed.sequences[0].bounds, at)
        moved_T = ~((after_TV - before_TV).abs().amax(-1) <= ALLOWED * scale)
        unseen += int(not bool(moved_T[at]))
        changed += int(moved_T[:at].sum() + moved_T[end:].sum())
    return [
        Check("positions changed by a token they must not see", changed, 0),
        Check("changed tokens that change nothing in their place", unseen, 0),
    ]


def _bytes(answers: Sequence[RankAnswer], parallel: ParallelConfig, small: PreTrainedModel) -> Check:
    """Bytes each rank sent for a step on packed documents, against the formula of its strategy."""
    first = answers[0].shapes
    blocks = [Block(t, h, g, d, c, _FP64_BYTES) for t, h, g, d, c in first]
    # Layers call in their order, once for each sequence of the case.
    rules = [rule for rule in layer_rules(small.config) if not rule.recurrent]
    wanted, ways = 0, (parallel.sp, parallel.ulysses)
    for call, block in enumerate(blocks):
        rule, held = rules[call % len(rules)], block.num_tokens * parallel.sp
        layout = lay_out(parallel.strategy, parallel.layout, held, *ways, (0, held))
        hops = count_hops(parallel.strategy, layout, parallel.ulysses, rule.window, rule.chunk)
        wanted += sum(bytes_sent(parallel.strategy, block, *ways, hops))
    shard_tokens = num_tokens(parallel.sp) // parallel.sp
    wanted += 2 * sum(mixer.bytes_sent(shard_tokens, _FP64_BYTES, parallel.sp) for mixer in mixer_facts(small))
    off = max(abs(answer.bytes_sent - wanted) for answer in answers)
    return Check("bytes sent beside the formula", off, 0, f"{wanted} bytes per rank and step")
