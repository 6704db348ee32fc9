"""parallel.strategy=auto: what is chosen follows from heads and windows, can always run, and says why."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan.config.check import check_run
from farspan.config.load import load_config
from farspan.config.schema import ParallelConfig, RunConfig
from farspan.errors import ConfigError
from farspan.models.checkpoint import make_config
from farspan.parallel.heads import plan_heads
from farspan.parallel.strategy import STRATEGIES, lay_out
from farspan.plan.choose import resolve_strategy
from farspan.plan.facts import ModelFacts, model_facts
from farspan.plan.run_plan import plan_run

FACTS = ModelFacts("llama", 2, 64, num_q_heads=8, num_kv_heads=2, head_dim=8, vocab_size=100, num_parameters=1000)
DEFAULTS = load_config(RunConfig, None, ["data.corpus=c"])


def auto(sp: int, layout: str = "auto") -> ParallelConfig:
    return ParallelConfig(workers=sp, sp=sp, strategy="auto", layout=layout)


# (query heads, key heads, ranks, furthest sight) -> (strategy, ranks that exchange heads, a word of the reason)
CHOICES = [
    (8, 2, 1, None, "ulysses", 1, "one process"),
    (8, 2, 8, None, "ulysses", 1, "8 query heads spread evenly over 8 processes"),
    (6, 6, 4, None, "hybrid", 2, "over 2 of 4 processes"),
    (8, 8, 12, None, "hybrid", 4, "over 4 of 12 processes"),
    (5, 1, 4, None, "ring", 1, "keys and values are fewer"),
    (5, 5, 4, None, "tokenring", 1, "queries are fewer"),
    (5, 5, 4, 16, "allgather", 1, "further than 16 tokens"),
    (5, 5, 4, 1000, "tokenring", 1, "queries are fewer"),
]


@pytest.mark.parametrize(("heads", "kv_heads", "sp", "reach", "strategy", "ulysses", "why"), CHOICES)
def test_heads_and_sight_decide_and_the_reason_names_them(
    heads: int, kv_heads: int, sp: int, reach: int | None, strategy: str, ulysses: int, why: str
) -> None:
    facts = replace(FACTS, num_q_heads=heads, num_kv_heads=kv_heads, reach=reach)
    choice = resolve_strategy(auto(sp), 960, facts)
    assert (choice.parallel.strategy, choice.parallel.ulysses) == (strategy, ulysses)
    assert choice.reason is not None
    assert why in choice.reason
    assert "\n" not in choice.reason


@settings(max_examples=200, deadline=None)
@given(
    kv_heads=st.integers(1, 9), group=st.integers(1, 9), sp=st.integers(1, 12), shard=st.integers(1, 40),
    reach=st.none() | st.integers(1, 100),
)  # fmt: skip
def test_whatever_is_chosen_passes_the_checks_pads_no_head_and_can_be_laid_out(
    kv_heads: int, group: int, sp: int, shard: int, reach: int | None
) -> None:
    tokens = max(2, shard * sp)
    tokens += -tokens % sp
    facts = replace(FACTS, num_q_heads=kv_heads * group, num_kv_heads=kv_heads, reach=reach)
    try:
        parallel = resolve_strategy(auto(sp), tokens, facts).parallel
    except ConfigError:
        pytest.fail("a free layout can always be cut")
    assert parallel.strategy in STRATEGIES
    check_run(replace(DEFAULTS, data=replace(DEFAULTS.data, sequence_tokens=tokens), parallel=parallel))
    layout = lay_out(parallel.strategy, parallel.layout, tokens, sp, parallel.ulysses, (0, 1, tokens))
    assert sorted(layout.order().tolist()) == list(range(tokens))
    inner = {"ulysses": sp, "hybrid": parallel.ulysses}.get(parallel.strategy, 1)
    assert plan_heads(facts.num_q_heads, kv_heads, inner).q_heads == facts.num_q_heads


def test_what_the_user_named_stays_and_has_no_reason() -> None:
    named = ParallelConfig(workers=4, sp=4, strategy="ring")
    assert resolve_strategy(named, 64, FACTS).parallel is named
    assert resolve_strategy(named, 64, FACTS).reason is None


def test_a_named_zigzag_that_cannot_be_cut_is_refused_also_under_auto() -> None:
    with pytest.raises(ConfigError, match="must be divisible by 8 for a zigzag over 4 ranks"):
        resolve_strategy(auto(4, "zigzag"), 68, FACTS)


def test_the_plan_of_an_automatic_run_names_the_strategy_and_says_why() -> None:
    config = load_config(
        RunConfig, None, ["data.corpus=c", "parallel.workers=4", "parallel.sp=4", "parallel.strategy=auto"]
    )
    check_run(config)
    plan = plan_run(config, replace(FACTS, num_q_heads=6, num_kv_heads=6), compute_bytes=2)
    assert (plan.strategy, plan.parallel.ulysses) == ("hybrid", 2)
    lines = dict(plan.lines())
    assert lines["attention"].startswith("hybrid, zigzag layout, 3 query heads")
    assert lines["strategy"].startswith("6 query heads spread evenly over 2 of 4 processes, not over all (")


def test_the_plan_says_how_layers_without_attention_are_shared() -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
             "layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 4, "num_experts": 4,
             "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip
    facts = model_facts(make_config("qwen3_next", small))
    config = load_config(RunConfig, None, ["data.corpus=c", "parallel.workers=4", "parallel.sp=4"])
    text = dict(plan_run(config, facts, compute_bytes=2).lines())["recurrent"]
    assert text == "1 layers over all tokens with 1 of 2 heads, 2 of 4 are padding"
