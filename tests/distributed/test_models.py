"""transformers' decoders over ranks against transformers alone in one process, document by document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.corpus import small_corpus
from tests.support.decoders import decoder_config
from tests.support.double import DoublePrecision
from tests.support.ranks import RankPool
from tests.support.runs import tiny_run
from tests.support.whole import whole_of

from farspan.config.schema import ParallelConfig, RunConfig
from farspan.plan.facts import model_facts
from farspan.plan.run_plan import plan_run
from farspan.train.build import build, model_config
from farspan.train.loss import PackedLoss
from farspan.verify.doctor import examine
from farspan.verify.probe import RankAnswer, Subject, examine_rank
from farspan.verify.reference import gradient_error

# (architecture, strategy, ranks, ranks that exchange heads)
LAYOUTS = [
    ("llama", "ulysses", 1, 1),
    ("llama", "ulysses", 4, 1),
    ("llama", "hybrid", 4, 2),
    ("qwen2", "ulysses", 4, 1),
    ("qwen3", "tokenring", 4, 1),
    ("mistral", "ring", 2, 1),
    ("mistral", "ulysses", 4, 1),
    ("gemma2", "ulysses", 2, 1),
    ("gemma2", "ring", 4, 1),
    ("gemma3_text", "allgather", 4, 1),
    ("phi", "ulysses", 2, 1),
    ("gpt_neox", "ring", 4, 1),
    ("llama4_text", "ring", 2, 1),
    ("cohere2", "tokenring", 2, 1),
    ("gpt_oss", "ulysses", 2, 1),
    ("gpt_oss", "ring", 4, 1),
    ("qwen3_next", "ring", 2, 1),
    ("qwen3_next", "hybrid", 4, 2),
    ("qwen3_5_text", "ulysses", 2, 1),
    ("olmo_hybrid", "ring", 4, 1),
    ("bamba", "ulysses", 4, 1),
    ("granitemoehybrid", "ring", 2, 1),
    ("qwen3_next", "ulysses", 4, 1),
    # What is missing above for every model to be shared by 1, 2 and 4 ranks.
    *((name, "ulysses", 1, 1) for name in ("qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi", "gpt_neox")),
    *((name, "ulysses", 1, 1) for name in ("llama4_text", "cohere2", "gpt_oss", "qwen3_next", "bamba")),
    ("llama", "tokenring", 2, 1),
    ("qwen2", "ring", 2, 1),
    ("qwen3", "allgather", 2, 1),
    ("gemma3_text", "ring", 2, 1),
    ("phi", "hybrid", 4, 2),
    ("gpt_neox", "tokenring", 2, 1),
    ("llama4_text", "allgather", 4, 1),
    ("cohere2", "hybrid", 4, 2),
    ("bamba", "ring", 2, 1),
]
# transformers sums gradients of these models in fp32 whatever their type: Gemma's and Cohere's norms cast their weight,
# recurrent layers their keys, values and states. Here both sides compute those parts in double precision.
SUMMED_IN_FP32 = {
    *("gemma2", "gemma3_text", "cohere2"),
    *("qwen3_next", "qwen3_5_text", "olmo_hybrid", "bamba", "granitemoehybrid"),
}


@pytest.mark.parametrize(("architecture", "strategy", "sp", "ulysses"), LAYOUTS)
def test_logits_loss_every_gradient_and_leaks_equal_plain_transformers(
    ranks: RankPool, architecture: str, strategy: str, sp: int, ulysses: int
) -> None:
    parallel = ParallelConfig(workers=sp, sp=sp, strategy=strategy, ulysses=ulysses)
    subject = Subject(decoder_config(architecture), parallel, PackedLoss)
    if architecture in SUMMED_IN_FP32:
        with DoublePrecision():
            certificate = examine(subject, lambda s: ranks.run(examine_rank_in_double, sp, s))
    else:
        certificate = examine(subject, lambda s: ranks.run(examine_rank, sp, s))
    assert {check.name: check for check in certificate.checks if check.measured > 1e-10} == {}
    seen = {check.name.removeprefix("loss, ") for check in certificate.checks}
    assert seen >= {"accumulation of 4", "60 % of the labels masked"}
    assert sp == 1 or "a rank without labels" in seen
    assert certificate.passed


def examine_rank_in_double(subject: Subject) -> RankAnswer:
    """`examine_rank`, and what transformers computes in fp32 whatever the model's type is computed in fp64."""
    with DoublePrecision():
        return examine_rank(subject)


# One model of each kind: what a user's doctor says of it.
@pytest.mark.parametrize(("architecture", "strategy", "ulysses"), [("gemma2", "ring", 1), ("qwen3_next", "hybrid", 2)])
def test_models_with_gradients_summed_in_fp32_are_certified_as_transformers_computes_them(
    ranks: RankPool, architecture: str, strategy: str, ulysses: int
) -> None:
    parallel = ParallelConfig(workers=4, sp=4, strategy=strategy, ulysses=ulysses)
    subject = Subject(decoder_config(architecture), parallel, PackedLoss)
    certificate = examine(subject, lambda s: ranks.run(examine_rank, 4, s))
    assert certificate.passed
    exact = [check for check in certificate.checks if not check.name.startswith("gradients")]
    assert {check.name: check for check in exact if check.measured > 1e-10} == {}


HYBRID: dict[str, Any] = {
    "layer_types": "[linear_attention,full_attention]",
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
WINDOWED: dict[str, Any] = {
    "layer_types": "[sliding_attention,full_attention]",
    "head_dim": 8,
    "sliding_window": 7,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 2.0,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_corpus(tmp_path_factory.mktemp("models"))


def first_gradients(config: RunConfig, cache: str) -> tuple[float, dict[str, torch.Tensor], int]:
    """(loss, every whole gradient, bytes sent) of the first step, on one rank."""
    step = build(config, torch.device("cpu"), Path(cache)).step
    loss, _ = step.backward()
    grads = {n: whole_of(p.grad) for n, p in step.loss.named_parameters() if p.grad is not None}
    return loss.item(), grads, step.exchange.bytes_sent


@pytest.mark.parametrize("recompute", ["false", "true"])
@pytest.mark.parametrize(("architecture", "settings"), [("qwen3_next", HYBRID), ("gemma2", WINDOWED)])
def test_sharded_weights_and_recomputing_give_what_one_process_gives(
    ranks: RankPool, corpus: str, tmp_path: Path, architecture: str, settings: dict[str, Any], recompute: str
) -> None:
    common = [f"model.architecture={architecture}", "model.dtype=float32"]
    alone = tiny_run(corpus, str(tmp_path / "one"), *common, **settings)
    shared = tiny_run(
        corpus, str(tmp_path / "two"), *common, "parallel.workers=2", "parallel.sp=2", f"train.recompute={recompute}",
        **settings,
    )  # fmt: skip
    want_loss, want, _ = ranks.run(first_gradients, 1, alone, str(tmp_path / "cache"))[0]
    facts = model_facts(model_config(shared, 300, tmp_path))
    for loss, got, sent in ranks.run(first_gradients, 2, shared, str(tmp_path / "cache")):
        assert loss == pytest.approx(want_loss, rel=1e-6)
        assert gradient_error(got, want)[0] < 1e-3
        assert sent == plan_run(shared, facts, compute_bytes=4).exchange_bytes_per_step
