"""transformers' decoders over ranks against transformers alone in one process, document by document."""

from __future__ import annotations

import pytest
from tests.support.decoders import decoder_config
from tests.support.ranks import RankPool

from farspan.config.schema import ParallelConfig
from farspan.train.loss import PackedLoss
from farspan.verify.doctor import examine
from farspan.verify.judge import Check
from farspan.verify.probe import Subject, examine_rank

# (architecture, strategy, ranks, ranks that exchange heads)
LAYOUTS = [
    ("llama", "ulysses", 1, 1),
    ("llama", "ulysses", 4, 1),
    ("llama", "hybrid", 4, 2),
    ("qwen2", "ulysses", 2, 1),
    ("qwen3", "tokenring", 4, 1),
    ("mistral", "ring", 2, 1),
    ("gemma2", "ulysses", 2, 1),
    ("gemma3_text", "allgather", 4, 1),
    ("phi", "ulysses", 2, 1),
    ("gpt_neox", "ring", 4, 1),
    ("llama4_text", "ring", 2, 1),
    ("cohere2", "tokenring", 2, 1),
    ("qwen3_next", "ring", 2, 1),
]
# transformers computes these models' norms or states in fp32 whatever their type: gradients are summed that exactly.
GRADIENTS_ALLOWED = {"gemma2": 1e-5, "gemma3_text": 1e-5, "cohere2": 1e-5, "qwen3_next": 2e-5}


@pytest.mark.parametrize(("architecture", "strategy", "sp", "ulysses"), LAYOUTS)
def test_logits_loss_every_gradient_and_leaks_equal_plain_transformers(
    ranks: RankPool, architecture: str, strategy: str, sp: int, ulysses: int
) -> None:
    parallel = ParallelConfig(workers=sp, sp=sp, strategy=strategy, ulysses=ulysses)
    subject = Subject(decoder_config(architecture), parallel, PackedLoss)
    certificate = examine(subject, lambda s: ranks.run(examine_rank, sp, s))
    wrong = {check.name: check for check in certificate.checks if not _exact(check, architecture)}
    assert wrong == {}
    seen = {check.name.removeprefix("loss, ") for check in certificate.checks}
    assert seen >= {"accumulation of 4", "60 % of the labels masked"}
    assert sp == 1 or "a rank without labels" in seen
    assert certificate.passed


def _exact(check: Check, architecture: str) -> bool:
    allowed = GRADIENTS_ALLOWED.get(architecture, 1e-10) if check.name.startswith("gradients") else 1e-10
    return check.measured <= min(allowed, check.allowed)
