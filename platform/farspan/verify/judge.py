"""From what the ranks computed and what one process computed to a list of checks. Every number is kept.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PretrainedConfig

from farspan.config.schema import ParallelConfig
from farspan.models.rules import layer_rules
from farspan.parallel import whole
from farspan.parallel.strategy import bytes_sent
from farspan.parallel.traffic import Block
from farspan.verify.cases import PACKED, SINGLE, Case, document_of
from farspan.verify.probe import RankAnswer
from farspan.verify.reference import StepAnswer

# fp64 on both sides, and the same arithmetic for every token.
ALLOWED = 1e-9
# transformers computes recurrent layers in fp32 whatever the model's type; gradients summed over shards show it.
RECURRENT_GRADIENTS_ALLOWED = 2e-5
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
    """One process's answers."""

    logits: dict[str, Tensor]
    steps: dict[str, StepAnswer]


def judge(
    answers: Sequence[RankAnswer],
    reference: Reference,
    cases: Sequence[Case],
    parallel: ParallelConfig,
    small: PretrainedConfig,
) -> tuple[Check, ...]:
    """Every check of an examination."""
    first = answers[0]
    checks = [
        Check(f"logits, {name}", relative(first.logits[name], reference.logits[name]), ALLOWED)
        for name in (PACKED, SINGLE)
    ]
    recurrent = any(rule.recurrent for rule in layer_rules(small))
    allowed = RECURRENT_GRADIENTS_ALLOWED if recurrent else ALLOWED
    for case in cases:
        got, want = first.steps[case.name], reference.steps[case.name]
        checks.append(Check(f"loss, {case.name}", abs(got.loss - want.loss) / abs(want.loss), ALLOWED))
        checks.append(_gradients(f"gradients, {case.name}", got.gradients, want.gradients, allowed))
    packed = next(case for case in cases if case.name == PACKED)
    checks.append(_leaks(first, packed))
    if parallel.sp > 1:
        checks.append(_bytes(answers, parallel, small))
    return tuple(checks)


def relative(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value wanted; NaN where there is one."""
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))


def _gradients(name: str, got: dict[str, Tensor], want: dict[str, Tensor], allowed: float) -> Check:
    if got.keys() != want.keys():
        return Check(name, float("inf"), allowed, f"other weights: {sorted(got.keys() ^ want.keys())[0]}")
    # Some gradients are zero in exact arithmetic (a key bias without rotation): they are held on the model's scale.
    floor = 1e-3 * max(float(g.abs().max()) for g in want.values())
    errors = {n: float((got[n] - g).abs().max()) / max(float(g.abs().max()), floor) for n, g in want.items()}
    worst = max(errors, key=lambda n: errors[n] if errors[n] == errors[n] else float("inf"))
    return Check(name, errors[worst], allowed, worst)


def _leaks(answer: RankAnswer, packed: Case) -> Check:
    """Positions outside a document, or before the token, that changed when one token of it was another one."""
    before_TV = answer.logits[PACKED]
    scale = before_TV.abs().max()
    changed = 0
    for at, after_TV in answer.leaks.items():
        _, end = document_of(packed.sequences[0].bounds, at)
        moved_T = ~((after_TV - before_TV).abs().amax(-1) <= ALLOWED * scale)
        assert bool(moved_T[at:end].any()), "the probe changed nothing"
        changed += int(moved_T[:at].sum() + moved_T[end:].sum())
    return Check("positions changed by a token they must not see", changed, 0)


def _bytes(answers: Sequence[RankAnswer], parallel: ParallelConfig, small: PretrainedConfig) -> Check:
    """Bytes each rank sent for a step on packed documents, against the formula of its strategy."""
    first = answers[0].shapes
    blocks = [Block(t, h, g, d, c, _FP64_BYTES) for t, h, g, d, c in first]
    wanted = sum(sum(bytes_sent(parallel.strategy, block, parallel.sp, parallel.ulysses)) for block in blocks)
    shard_tokens = first[0][0] if first else 0
    recurrent = sum(rule.recurrent for rule in layer_rules(small))
    width = small.get_text_config(decoder=True).hidden_size
    wanted += 2 * recurrent * whole.bytes_sent(shard_tokens, width, _FP64_BYTES, parallel.sp)
    off = max(abs(answer.bytes_sent - wanted) for answer in answers)
    return Check("bytes sent beside the formula", off, 0, f"{wanted} bytes per rank and step")
