"""What the config refuses about sharing a sequence, and what the plan says of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from farspan.config import check
from farspan.config.load import load_config
from farspan.config.schema import RunConfig
from farspan.errors import ConfigError
from farspan.models.rules import LayerRule
from farspan.parallel import layout, strategy
from farspan.plan.facts import ModelFacts
from farspan.plan.hybrid import document_cost
from farspan.plan.run_plan import plan_run

HDP = ["parallel.hdp=true"]
AUTO = ["train.recompute=true", "memory.offload_activations=cpu", "memory.swap_share=auto"]


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
        (["memory.swap_share=1.5"], "memory.swap_share: must lie in 0..1, got 1.5; use memory.swap_share=1"),
        (["memory.swap_share=most"], "memory.swap_share: must be a number in 0..1, or auto, got 'most'; use .*=auto"),
        (["memory.swap_share=auto"], "memory.swap_share: .* needs both, got 'auto'; use train.recompute=true"),
        ([*AUTO, "memory.chunk=seco"], "auto does not go with memory.chunk=seco, .* use memory.chunk=none or a number"),
        ([*AUTO, *HDP], "auto does not go with parallel.hdp=True, .* use parallel.hdp=false or a number"),
        ([*AUTO, "weights.engine=deepspeed"], "auto does not go with weights.engine=deepspeed, .* use .*=fsdp2"),
        (["memory.swap_share=0.5"], "memory.swap_share: .* needs both, got 0.5; use train.recompute=true"),
        (
            ["memory.chunk=seco", "memory.offload_activations=nvme"],
            "in place when .* seco.*=cpu or cxl",
        ),
        (["memory.chunk=spaco", "memory.chunk_sampling=random"], "memory.chunk_sampling: must be one of independent, "),
        (["memory.chunk=seco", "memory.chunk_sampling=importance"], "independent when memory.chunk is seco, .*=spaco"),
        (
            ["memory.chunk=spaco", "memory.chunk_sampling=without_replacement"],
            "decides about chunks with labels itself, .* use memory.chunk_keep_labelled=false",
        ),
        (["train.reprobe_every=5", "lora.rank=4"], "train.reprobe_every: .* lora.rank=0"),
        (["weights.engine=deepspeed", "model.dtype=float64"], "fp32 weights that DeepSpeed keeps.*model.dtype=float32"),
        (["lora.dropout=0.1"], "lora.dropout: must be 0: dropped values would depend .* use lora.dropout=0"),
        (["parallel.rank_tokens=64"], "parallel.rank_tokens: needs parallel.hdp=true, got 64"),
        (["parallel.spill=0.5"], "parallel.spill: needs parallel.hdp=true"),
        (["parallel.hdp_cost=measured"], "parallel.hdp_cost: needs parallel.hdp=true, got 'measured'; leave it out"),
        ([*HDP, "parallel.hdp_cost=timed"], "parallel.hdp_cost: must be one of counted, measured, got 'timed'"),
        ([*HDP, "parallel.spill=0.5"], "parallel.spill: needs a place: .*memory.offload_activations=cpu"),
        ([*HDP, "parallel.spill=1"], "parallel.spill: must lie in 0..0.95"),
        ([*HDP, "parallel.rank_tokens=2000"], r"must be at least 2048: .*\(8192\), .* 4 processes.*rank_tokens=2048"),
        ([*HDP, "parallel.strategy=hybrid"], "parallel.strategy: must be one of auto, ulysses, ring, tokenring"),
        (
            [*HDP, "parallel.layout=zigzag"],
            "parallel.layout: does not go with parallel.hdp: .* use parallel.layout=auto",
        ),
        ([*HDP, "memory.chunk=seco"], "memory.chunk: does not go with parallel.hdp: .* use memory.chunk=none"),
        ([*HDP, "weights.engine=deepspeed"], "weights.engine: does not go with parallel.hdp: .*fsdp2"),
        ([*HDP, "train.reprobe_every=3"], "train.reprobe_every: does not go with parallel.hdp: .*reprobe_every=0"),
        ([*HDP, "train.certificate=c"], "train.certificate: does not go with parallel.hdp: .* leave train.certificate"),
        (
            ["train.label_smoothing=1"],
            "train.label_smoothing: must be at least 0 and less than 1, .* got 1.0; use",
        ),
        (["train.label_smoothing=-0.1"], "train.label_smoothing: must be at least 0 .* got -0.1"),
        (["train.label_smoothing=nan"], "train.label_smoothing: must be at least 0 .* got nan"),
        (["train.z_loss=-1e-4"], "train.z_loss: must lie in 0..1000, got -0.0001; use train.z_loss=0"),
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
        AUTO,
        [*AUTO, "memory.swap_share=1"],
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


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.strategy=ring", "data.sequence_tokens=1004"],
        ["parallel.rank_tokens=2048", "parallel.spill=0.5", "memory.offload_activations=cpu"],
        ["parallel.strategy=auto", "lora.rank=4", "train.recompute=true", "memory.tiled_mlp=true"],
    ],
)
def test_what_goes_with_documents_on_ranks_of_their_own_is_accepted(overrides: list[str]) -> None:
    accepted = config(*HDP, *overrides)
    check.check_run(accepted)
    assert dict(plan_run(accepted, FACTS, compute_bytes=2).lines())["mesh"].startswith("none: ")


def test_the_plan_of_documents_on_ranks_of_their_own_names_what_each_gets_and_what_it_costs() -> None:
    chosen = plan_run(config(*HDP, "parallel.strategy=auto", "parallel.rank_tokens=3000"), FACTS, compute_bytes=2)
    text = dict(chosen.lines())
    assert chosen.parallel.strategy == "ring"
    assert text["mesh"] == "none: the documents of 1 sequences over 4 processes"
    assert text["tokens"] == "at most 3000 per process at a time, 8192 per step in all"
    assert text["ranks"] == "a document of s tokens is on ceil(s / 3000), the longest possible on 3 processes"
    assert text["attention"] == "ring among the processes of a document"
    assert text["exchange"].startswith("nothing for documents of up to 3000 tokens, ")
    gathered = FACTS.num_parameters * (2 + 4) / 2**20
    assert text["gathered"] == f"{gathered:.1f} MiB more per process during a step: whole weights and gradients"
    assert chosen.exchange_bytes_per_step > 0


def test_documents_cost_their_square_where_all_is_seen_and_their_length_where_a_window_ends() -> None:
    whole = document_cost(FACTS)
    windowed = document_cost(replace(FACTS, attention_rules=(LayerRule(window=128),) * FACTS.num_layers))
    # A query and a key are D products, a probability and a value D more; a causal score is half of all.
    per_pair = 4 * FACTS.num_layers * FACTS.num_q_heads * FACTS.head_dim
    assert whole.quadratic == 3.5 * per_pair / 2
    assert windowed.quadratic == 0
    assert windowed.linear - whole.linear == 3.5 * per_pair * 128
