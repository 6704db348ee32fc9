"""The doctor: a layout on local processes against transformers alone in one process, on a small copy of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PretrainedConfig

from farspan.config.schema import ParallelConfig
from farspan.models.rules import refuse_unsupported
from farspan.verify.cases import PACKED, SINGLE, Case
from farspan.verify.certificate import Certificate, certify
from farspan.verify.judge import Reference, judge
from farspan.verify.probe import RankAnswer, Subject, examine_rank, probe_cases
from farspan.verify.ranks import ask_ranks
from farspan.verify.reference import reference_logits, reference_step, rounding, use_reference_attention
from farspan.verify.selfcheck import check_model
from farspan.verify.shrink import small_model

AskRanks = Callable[[Subject], Sequence[RankAnswer]]
_DEADLINE_S = 300.0


def examine(subject: Subject, ask: AskRanks | None = None) -> Certificate:
    """Examine `subject`; `ask` runs it on its ranks (none: on processes started here and ended here).

    Raises:
        ModelError: farspan refuses the model, whatever the layout.
        PlanError: the ranks could not be asked.
    """
    refuse_unsupported(subject.config)
    check_model(subject.config)
    answers = (ask or _own_ranks)(subject)
    cases = probe_cases(subject.parallel)
    reference = reference_of(subject.config, cases)
    checks = judge(answers, reference, cases, subject.parallel, small_model(subject.config))
    return certify(subject.config, subject.parallel, checks)


def reference_of(config: PretrainedConfig, cases: Sequence[Case]) -> Reference:
    """What one plain process computes for the same cases, from the same weights."""
    model = small_model(config)
    use_reference_attention(model)
    with torch.no_grad():
        logits = {c.name: reference_logits(model, c.sequences[0]) for c in cases if c.name in (PACKED, SINGLE)}
    steps = {case.name: reference_step(model, case) for case in cases}
    return Reference(logits, steps, rounding(model, cases[0].sequences[0]))


def same_layout(parallel: ParallelConfig) -> ParallelConfig:
    """The config of one sequence's ranks alone: sequences side by side only add up."""
    return ParallelConfig(**{**vars(parallel), "workers": parallel.sp})


def _own_ranks(subject: Subject) -> Sequence[RankAnswer]:
    return ask_ranks(examine_rank, subject.parallel.sp, subject, deadline_s=_DEADLINE_S)
