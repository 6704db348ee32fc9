"""Plans are plain arithmetic: checked against counted models and written-out formulas."""

from __future__ import annotations

import pytest
import torch
from tests.support.runs import tiny_run

from farspan.errors import ConfigError
from farspan.models.checkpoint import make_config, random_causal_lm
from farspan.plan.facts import model_facts
from farspan.plan.run_plan import plan_run

SETTINGS = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 99,
}


@pytest.mark.parametrize("tied", [True, False])
def test_facts_equal_the_model_itself(tied: bool) -> None:
    config = make_config("llama", {**SETTINGS, "tie_word_embeddings": tied})
    facts = model_facts(config)
    model = random_causal_lm(config, 0)
    assert facts.num_parameters == sum(p.numel() for p in model.parameters())
    assert (facts.num_q_heads, facts.num_kv_heads, facts.head_dim, facts.num_layers) == (6, 3, 8, 3)


def test_state_bytes_equal_the_bytes_adamw_really_keeps() -> None:
    config = make_config("llama", SETTINGS)
    model = random_causal_lm(config, 0)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(4).unsqueeze(0)).logits.sum().backward()
    optimizer.step()
    moments = sum(
        t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if t.ndim > 0
    )  # the scalar step counts are not state that grows
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    plan = plan_run(tiny_run("c", "o", "model.dtype=float32"), model_facts(config), compute_bytes=4)
    assert plan.state_bytes == moments + weights


def test_a_sequence_longer_than_the_models_positions_is_refused() -> None:
    facts = model_facts(make_config("llama", {**SETTINGS, "max_position_embeddings": 60}))
    with pytest.raises(ConfigError, match=r"max_position_embeddings \(60\), got 64; use data.sequence_tokens=60"):
        plan_run(tiny_run("c", "o"), facts, compute_bytes=4)


def test_tokens_of_a_step_count_every_sequence_side_by_side_and_in_turn() -> None:
    config = tiny_run(
        "c", "o", "parallel.workers=6", "parallel.sp=3", "data.sequence_tokens=66", "train.accumulation=5"
    )
    plan = plan_run(config, model_facts(make_config("llama", SETTINGS)), compute_bytes=2)
    assert (plan.dp, plan.sp, plan.shard_tokens, plan.tokens_per_step) == (2, 3, 22, 66 * 2 * 5)


def test_heads_that_do_not_divide_are_padded_and_the_plan_says_so() -> None:
    config = tiny_run("c", "o", "parallel.workers=4", "parallel.sp=4")
    plan = plan_run(config, model_facts(make_config("llama", SETTINGS)), compute_bytes=2)
    assert plan.q_heads_per_rank == 2
    assert dict(plan.lines())["query heads"].startswith("2 of 8 are padding")


def test_the_plan_says_where_things_lie_and_that_an_emulated_tier_is_one() -> None:
    chunked = ["memory.chunk=seco", "memory.chunk_tokens=16", "memory.offload_activations=cxl", "optim.kind=adamw8bit"]
    config = tiny_run("c", "o", "model.dtype=float32", *chunked, "memory.tiers=[cxl:emulated:1GiB,nvme:/x:1GiB]")
    memory = dict(plan_run(config, model_facts(make_config("llama", SETTINGS)), compute_bytes=4).lines())["memory"]
    assert memory.startswith(
        "seco by chunks of 16 tokens; keys and values of all chunks in cxl:emulated:1GiB (emulated)"
    )
    assert "8 bits" in memory
    assert "nvme" not in memory
    plain = plan_run(tiny_run("c", "o"), model_facts(make_config("llama", SETTINGS)), compute_bytes=8)
    assert "memory" not in dict(plain.lines())


def test_the_plan_says_by_what_documents_are_balanced_and_where_measured_seconds_are_kept() -> None:
    facts = model_facts(make_config("llama", SETTINGS))
    said = {}
    for cost in ("counted", "measured"):
        config = tiny_run("c", "/runs/o", "parallel.hdp=true", f"parallel.hdp_cost={cost}")
        said[cost] = dict(plan_run(config, facts, compute_bytes=8).lines())["balance"]
    assert "counted by the model's config, not measured" in said["counted"]
    assert "measured before the first step" in said["measured"]
    assert "/runs/o/hdp_cost.json" in said["measured"]
    assert "balance" not in dict(plan_run(tiny_run("c", "o"), facts, compute_bytes=8).lines())


def test_the_plan_says_how_chunks_are_drawn_and_when_that_is_biased() -> None:
    said = {}
    for sampling in ("independent", "importance", "without_replacement"):
        drawn = ["memory.chunk=spaco", f"memory.chunk_sampling={sampling}", "memory.chunk_keep_labelled=false"]
        plan = plan_run(tiny_run("c", "o", *drawn), model_facts(make_config("llama", SETTINGS)), compute_bytes=8)
        said[sampling] = dict(plan.lines())["memory"]
    assert "each drawn with probability 0.5" in said["independent"]
    assert "0.5 of them drawn on average, those with more labels more often" in said["importance"]
    assert "biased" in said["without_replacement"]
    assert sum("biased" in text for text in said.values()) == 1
