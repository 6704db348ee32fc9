"""How a model is cut over ranks is decided by transformers' plan, covers every weight once, and is refused in time."""

from __future__ import annotations

import pytest
import torch
from tests.support.zoo import zoo_config
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from farspan.engine.cut_plan import Cut, check_cut, plan_cuts
from farspan.errors import ConfigError, ModelError

CUT = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "mixtral", "qwen3_moe", "deepseek_v2"]


def empty(kind: str, **settings: object) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(zoo_config(kind, **settings))


@pytest.mark.parametrize("kind", CUT)
def test_ranks_together_keep_every_part_of_every_weight_and_heads_whole(kind):
    model = empty(kind, vocab_size=62)
    plan = plan_cuts(model, 2)
    weights = dict(model.named_parameters(remove_duplicate=False))
    for cut in plan.cuts:
        assert weights[cut.weight].shape[cut.dim] == cut.size
        kept = [place for rank in range(2) for part in cut.kept(rank, 2) for place in part]
        assert sorted(kept) == list(range(cut.size))
    names = [cut.weight for cut in plan.cuts]
    assert len(set(names)) == len(names)
    layer = "model.layers.1."
    assert {name for name in names if name.startswith(layer) and "attn" in name} == {
        name for name in weights if name.startswith(layer) and "attn" in name and not _whole(name)
    }
    assert plan.gathered == "lm_head"
    assert sum(name.endswith("o_proj") for name in plan.summed) == 2


def _whole(name: str) -> bool:
    """Norms, and what latent attention computes before there are heads."""
    return "norm" in name or "_a_" in name or name.endswith("o_proj.bias")


@pytest.mark.parametrize(
    ("kind", "settings", "num_ranks", "said"),
    [
        ("llama", {}, 3, "the 4 heads of model.layers.*.self_attn.q_proj, got 3; use engine.tensor_parallel=2 or 4"),
        ("llama", {"num_key_value_heads": 4, "intermediate_size": 46}, 4, "the 46 channels of model.layers.*.mlp"),
        ("llama", {}, 8, "use engine.tensor_parallel=4"),
    ],
    ids=str,
)
def test_a_degree_that_does_not_divide_is_refused_with_the_nearest_that_does(kind, settings, num_ranks, said):
    with pytest.raises(ConfigError) as refused:
        check_cut(zoo_config(kind, **settings), num_ranks)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("gpt2", "gpt2: transformers has no plan that cuts its heads; use engine.tensor_parallel=1"),
        ("phi3", "phi3: its plan for several ranks wants model.layers.0.self_attn"),
        ("olmo2", "olmo2: its plan for several ranks wants model.layers.0.self_attn.q_proj colwise_gather_output"),
    ],
)
def test_a_model_without_a_plan_that_is_done_here_is_refused_by_name(kind, said):
    with pytest.raises(ModelError) as refused:
        check_cut(zoo_config(kind), 2)
    assert said in str(refused.value)


def test_fewer_key_heads_than_ranks_are_kept_by_several_beside_their_own_query_heads():
    plan = plan_cuts(empty("llama", num_attention_heads=8, num_key_value_heads=2), 8)
    found = {cut.weight.split(".")[-2]: cut for cut in plan.cuts if cut.weight.startswith("model.layers.0.")}
    keys, queries = found["k_proj"], found["q_proj"]
    assert (keys.num_units, queries.num_units) == (2, 8)
    for rank in range(8):
        (key_rows,), (query_rows,) = keys.kept(rank, 8), queries.kept(rank, 8)
        assert query_rows.start // queries.unit // 4 == key_rows.start // keys.unit
        assert len(key_rows) == keys.unit


def test_a_vocabulary_that_does_not_divide_stays_whole():
    assert plan_cuts(empty("llama", vocab_size=61), 2).gathered is None
    assert plan_cuts(empty("llama", vocab_size=62), 2).gathered == "lm_head"


def test_matrices_side_by_side_are_cut_each():
    cut = Cut("gate_up", 0, 24, sections=2)
    assert cut.kept(1, 3) == [range(4, 8), range(16, 20)]
    whole = nn.Linear(3, 24, bias=False)
    x_TE = torch.randn(5, 3)
    gate, up = whole(x_TE).chunk(2, -1)
    rows = torch.cat([torch.arange(r.start, r.stop) for r in cut.kept(1, 3)])
    mine_gate, mine_up = nn.functional.linear(x_TE, whole.weight[rows]).chunk(2, -1)
    torch.testing.assert_close(mine_gate, gate[:, 4:8])
    torch.testing.assert_close(mine_up, up[:, 4:8])
