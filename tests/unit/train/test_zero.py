"""Where DeepSpeed cannot run it is refused in a sentence, and what it is told follows from the run's config."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from farspan.config.schema import OptimConfig, WeightsConfig
from farspan.errors import ConfigError
from farspan.train.weights import weight_groups
from farspan.train.zero import refuse_without_deepspeed, zero_config


def test_a_missing_deepspeed_is_refused_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"not installed, .* run `pip install 'farspan\[deepspeed\]'`"):
        refuse_without_deepspeed()


def test_a_launcher_that_does_not_name_the_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ConfigError, match="needs a launcher that sets LOCAL_RANK"):
        refuse_without_deepspeed()
    monkeypatch.setenv("LOCAL_RANK", "0")
    refuse_without_deepspeed()


def test_stage_3_cuts_every_matrix_and_no_vector() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(7))
    config = zero_config(module, torch.bfloat16, OptimConfig(), WeightsConfig(engine="deepspeed", zero=3))
    threshold = config["zero_optimization"]["stage3_param_persistence_threshold"]
    # DeepSpeed keeps whole what has no more numbers than that.
    assert [p.numel() > threshold for p in module.parameters()] == [p.ndim > 1 for p in module.parameters()]
    assert config["bf16"]["enabled"] is True


def test_weight_decay_pulls_matrices_that_are_trained_and_nothing_else() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
    module[1].requires_grad_(False)
    groups = weight_groups(module, OptimConfig(weight_decay=0.3))
    assert [(g["weight_decay"], [p.ndim for p in g["params"]]) for g in groups] == [(0.3, [2]), (0.0, [1])]
    module[0].bias.requires_grad_(False)
    assert len(weight_groups(module, OptimConfig())) == 1
