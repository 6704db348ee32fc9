"""A model with farspan's kernels in place of torch's modules computes what it computed before."""

from __future__ import annotations

import shutil

import pytest
import torch
from tests.unit.engine.tiny import engine_config, prompts, tiny_model
from torch import nn

from farspan.engine import blocks, faster, turns
from farspan.engine.engine import Engine
from farspan.engine.norms import known_norm
from farspan.engine.request import SamplingParams
from farspan.kernels.chain.native import load_native as load_chain
from farspan.kernels.linear.native import load_native
from farspan.kernels.linear.reference import bind_linear_reference
from farspan.kernels.rms_norm.contract import Kind
from farspan.kernels.rms_norm.reference import bind_rms_norm_reference

NORMS = {"llama": 7, "gemma2": 13, "qwen3": 13}


@pytest.fixture
def references(monkeypatch):
    """The kernels' references, which every machine has."""
    monkeypatch.setattr(faster, "choose_linear", lambda device, dtype: bind_linear_reference)
    monkeypatch.setattr(faster, "choose_rms_norm", lambda device, dtype: bind_rms_norm_reference)
    monkeypatch.setattr(turns, "choose_angles", lambda device, dtype: None)
    monkeypatch.setattr(blocks, "choose_chain", lambda device, dtype: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", sorted(NORMS))
def test_every_normalization_and_linear_layer_is_switched_and_gives_what_it_gave(
    architecture, dtype, references
) -> None:
    model = tiny_model(architecture).to(dtype)
    tokens = torch.tensor(prompts(40))
    with torch.inference_mode():
        want = model(tokens, use_cache=False).logits.double()
        linears = sum(type(module) is nn.Linear for module in model.modules())
        assert faster.speed_up(model) == linears + NORMS[architecture]
        got = model(tokens, use_cache=False).logits.double()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert float((got - want).norm() / want.norm()) <= tolerance


def test_a_normalization_of_another_kind_keeps_its_own_forward(references) -> None:
    class DoubledRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.randn(8)), 1e-6

        def forward(self, x):
            return 2 * bind_rms_norm_reference(self.weight, self.eps, Kind.SCALED)(x)

    module = DoubledRMSNorm()
    assert known_norm(module, torch.float32) is None


def test_rows_of_another_type_no_rows_and_exchanged_weights_go_to_the_module_itself(references) -> None:
    model = tiny_model().bfloat16()
    norm, linear = model.model.norm, model.lm_head
    plain = tiny_model().bfloat16()
    faster.speed_up(model)
    x = torch.randn(3, norm.weight.shape[0])
    with torch.inference_mode():
        # As the last normalization of a Mamba gets them, whose residual is fp32.
        assert torch.equal(norm(x), plain.model.norm(x))
        assert linear(x[:0].bfloat16()).shape == (0, linear.out_features)
        for module, own in ((norm, plain.model.norm), (linear, plain.lm_head)):
            own.weight.data = module.weight.data = torch.randn_like(own.weight)
            assert torch.equal(module(x.bfloat16()), own(x.bfloat16()))


def test_a_normalization_that_rounds_elsewhere_keeps_its_own_forward() -> None:
    class LateRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.randn(64).bfloat16()), 1e-6

        def forward(self, x):
            wide = x.float()
            return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight.float()).to(x.dtype)

    module = LateRMSNorm()
    assert known_norm(module, torch.bfloat16) is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_answers_in_bf16_by_the_kernels_are_as_near_to_fp32_as_those_of_torch(monkeypatch) -> None:
    # Also where the processor has bf16 arithmetic.
    monkeypatch.setattr(faster, "choose_linear", lambda device, dtype: load_native())
    monkeypatch.setattr(blocks, "choose_chain", lambda device, dtype: load_chain())
    rows = prompts(30, 18, 7)
    params = SamplingParams(max_tokens=1, logprobs=0, prompt_logprobs=0)
    wide = tiny_model().float()

    def logprobs(switched: bool):
        if not switched:
            monkeypatch.setattr(faster, "choose_linear", lambda device, dtype: None)
            monkeypatch.setattr(faster, "choose_rms_norm", lambda device, dtype: None)
            monkeypatch.setattr(blocks, "choose_chain", lambda device, dtype: None)
        engine = Engine(tiny_model().bfloat16(), engine_config(dtype="bfloat16"))
        answers = engine.generate(rows, params)
        return torch.tensor([found.logprob for answer in answers for found in answer.prompt_logprobs])

    with torch.inference_mode():
        logits = [wide(torch.tensor([row]), use_cache=False).logits[0].log_softmax(-1) for row in rows]
    want = torch.cat(
        [x[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0] for x, row in zip(logits, rows, strict=True)]
    )
    ours, torchs = (float((logprobs(switched) - want).norm()) for switched in (True, False))
    assert ours <= 1.5 * torchs
