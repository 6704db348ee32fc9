"""What the config refuses about sharing a sequence, and what the plan says of it."""

from __future__ import annotations

import pytest

from farspan.config import check
from farspan.config.load import load_config
from farspan.config.schema import RunConfig
from farspan.errors import ConfigError
from farspan.parallel import layout, strategy
from farspan.plan.facts import ModelFacts
from farspan.plan.run_plan import plan_run


def config(*overrides: str) -> RunConfig:
    return load_config(RunConfig, None, ["data.corpus=corpus", "parallel.workers=4", "parallel.sp=4", *overrides])


def test_the_config_knows_the_strategies_and_layouts_that_exist() -> None:
    assert ("auto", *strategy.STRATEGIES) == check.STRATEGIES
    assert ("auto", *layout.LAYOUTS) == check.LAYOUTS


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.strategy=rings"], "must be one of auto, ulysses, ring, .* got 'rings'.*ring"),
        (["parallel.layout=zig"], "parallel.layout: must be one of auto, .*zigzag"),
        (["parallel.ulysses=2"], "must be 1 for ulysses, got 2; use parallel.strategy=hybrid"),
        (["parallel.strategy=hybrid", "parallel.ulysses=3"], r"must divide parallel.sp \(4\), got 3; use .*=2"),
        (
            ["parallel.strategy=ring", "data.sequence_tokens=1004"],
            "divisible by 8 for a zigzag over 4 ranks, got 1004; use data.sequence_tokens=1008 or .*document_zigzag",
        ),
        (
            ["parallel.strategy=hybrid", "parallel.ulysses=2", "data.sequence_tokens=1006"],
            r"parallel.sp: must divide data.sequence_tokens \(1006\), got 4",
        ),
        (["weights.engine=deepsped"], "must be one of fsdp2, deepspeed, got 'deepsped'.*deepspeed"),
        (["weights.engine=deepspeed", "weights.zero=4"], "weights.zero: must lie in 1..3, got 4; use weights.zero=3"),
        (["optim.kind=adamw8bit", "weights.engine=deepspeed"], "another for optim.kind=adamw8bit, .*engine=fsdp2"),
        (["memory.chunk=seco", "parallel.strategy=ring"], "parallel.strategy: must be one of auto, ulysses"),
        (["memory.chunk=seco", "memory.chunk_tokens=1023"], "memory.chunk_tokens: must be a multiple of parallel.sp"),
        (["memory.swap_share=0.5"], "memory.swap_share: .* needs both, got 0.5; use train.recompute=true"),
        (
            ["memory.chunk=seco", "memory.offload_activations=nvme"],
            "in place when .* seco.*=cpu or cxl",
        ),
        (["train.reprobe_every=5", "lora.rank=4"], "train.reprobe_every: .* lora.rank=0"),
        (["weights.engine=deepspeed", "model.dtype=float64"], "fp32 weights that DeepSpeed keeps.*model.dtype=float32"),
        (["lora.dropout=0.1"], "lora.dropout: must be 0: dropped values would depend .* use lora.dropout=0"),
        (["lora.rank=-1"], "lora.rank: must be at least 0"),
        (["lora.targets=[all-linear,q_proj]"], "all-linear stands alone"),
    ],
)
def test_what_cannot_run_is_refused_with_the_nearest_legal_value(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check.check_run(config(*overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.strategy=ring", "parallel.layout=document_zigzag", "data.sequence_tokens=1004"],
        ["parallel.strategy=ring", "parallel.layout=contiguous", "data.sequence_tokens=1004"],
        ["parallel.strategy=hybrid", "parallel.ulysses=2", "data.sequence_tokens=1004"],
        ["parallel.strategy=hybrid", "parallel.ulysses=4", "data.sequence_tokens=1004"],
        ["parallel.sp=1", "parallel.strategy=ring", "data.sequence_tokens=1003"],
    ],
)
def test_what_the_config_accepts_can_be_laid_out(overrides: list[str]) -> None:
    chosen = config(*overrides)
    check.check_run(chosen)
    tokens, parallel = chosen.data.sequence_tokens, chosen.parallel
    laid = strategy.lay_out(parallel.strategy, parallel.layout, tokens, parallel.sp, parallel.ulysses, (0, 7, tokens))
    assert laid.num_ranks == parallel.sp
    assert laid.shard_tokens * parallel.sp == tokens


FACTS = ModelFacts("llama", 2, 320, num_q_heads=5, num_kv_heads=1, head_dim=64, vocab_size=100, num_parameters=1000)


def test_the_plan_says_which_heads_are_copied_and_padded() -> None:
    plan = plan_run(config(), FACTS, compute_bytes=2)
    assert (plan.q_heads_per_rank, plan.kv_head_copies) == (2, 3)
    text = dict(plan.lines())
    assert text["attention"] == "ulysses, contiguous layout, 2 query heads per process"
    assert text["query heads"].startswith("3 of 8 are padding")
    ring = plan_run(config("parallel.strategy=ring"), FACTS, compute_bytes=2)
    assert dict(ring.lines())["attention"] == "ring, zigzag layout, 5 query heads per process"
    assert "query heads" not in dict(ring.lines())


def test_a_ring_of_few_key_heads_sends_less_than_a_token_ring() -> None:
    sent = {
        name: plan_run(config(f"parallel.strategy={name}"), FACTS, compute_bytes=2).exchange_bytes_per_step
        for name in ("ring", "tokenring")
    }
    assert sent["ring"] < sent["tokenring"]
