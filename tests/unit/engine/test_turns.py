"""Angles by the kernel are those that transformers' own modules give, and who computes others keeps its own."""

import shutil

import pytest
import torch
from tests.unit.engine.tiny import tiny_model

from farspan.engine.turns import switch_turns

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
}


@needs_compiler
@pytest.mark.parametrize("rope", list(ROPES))
@pytest.mark.parametrize("count", [1, 7, 100])
def test_switched_angles_equal_transformers_own_at_every_length(rope, count) -> None:
    plain, model = (tiny_model(rope_parameters=ROPES[rope]).bfloat16() for _ in range(2))
    assert switch_turns(model) == 1
    positions, x = 1000 + torch.arange(count)[None] * 37, torch.zeros(1, count, 8).bfloat16()
    got, want = (each.model.rotary_emb(x, position_ids=positions) for each in (model, plain))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-6)
        assert int((ours != theirs).sum()) <= ours.numel() // 20


@needs_compiler
@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, {"rope_type": "default", "rope_theta": 1e4}],
    ids=["frequencies that change", "fp32"],
)
def test_frequencies_that_change_and_other_types_stay_with_the_module(rope) -> None:
    model = tiny_model(rope_parameters=rope)
    assert switch_turns(model.bfloat16() if rope["rope_type"] == "dynamic" else model.float()) == 0


@needs_compiler
def test_frequencies_that_were_exchanged_and_several_rows_go_to_the_module_itself() -> None:
    model, plain = (tiny_model().bfloat16() for _ in range(2))
    assert switch_turns(model) == 1
    x, positions = torch.zeros(2, 3, 8).bfloat16(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert torch.equal(model.model.rotary_emb(x, positions)[0], plain.model.rotary_emb(x, positions)[0])
    for each in (model, plain):
        each.model.rotary_emb.inv_freq = each.model.rotary_emb.inv_freq * 2
    assert torch.equal(model.model.rotary_emb(x[:1], positions[:1])[0], plain.model.rotary_emb(x[:1], positions[:1])[0])
