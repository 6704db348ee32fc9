"""A model whose layers are computed by chains of steps answers as before; what does anything else keeps its forward."""

from __future__ import annotations

import shutil

import pytest
import torch
from tests.unit.engine.tiny import engine_config, prompts, tiny_model
from torch import nn

from farspan.engine import blocks, faster
from farspan.engine.adjoin import lay_together
from farspan.engine.blocks import _Block, _Gated
from farspan.engine.engine import Engine
from farspan.engine.request import SamplingParams
from farspan.kernels.chain.native import load_native
from farspan.kernels.chain.reference import bind_chain_reference

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
BINDS = [
    pytest.param(lambda: bind_chain_reference, id="reference"),
    pytest.param(load_native, id="native", marks=needs_compiler),
]
# Layers and MLPs that are switched, of three each.
SWITCHED = {
    "llama": (3, 3),
    "mistral": (3, 3),
    "qwen2": (3, 3),
    "qwen3": (3, 3),
    "gemma2": (3, 3),
    "gemma3_text": (3, 3),
    # Its normalizations round elsewhere.
    "olmo2": (0, 3),
    # Some of its layers do not turn their queries and keys.
    "smollm3": (3, 3),
    # Multiplies what its layers add.
    "granite": (0, 3),
    # One projection for gate and up.
    "phi3": (0, 0),
}


def count(model: nn.Module) -> tuple[int, int]:
    forwards = [vars(module).get("forward") for module in model.modules()]
    return sum(isinstance(each, _Block) for each in forwards), sum(isinstance(each, _Gated) for each in forwards)


def engine_of(architecture: str, monkeypatch, bind) -> Engine:
    monkeypatch.setattr(blocks, "choose_chain", lambda device, dtype: bind)
    return Engine(half(architecture), engine_config(dtype="bfloat16"))


def half(architecture: str):
    settings = {"residual_multiplier": 0.3} if architecture == "granite" else {}
    # Weights that leave something of each layer's input, as a trained model's do.
    model = tiny_model(architecture, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5) if parameter.ndim > 1 else parameter.normal_(1.0, 0.2)
    return model.bfloat16()


def prompt_logprobs(engine: Engine, rows: list[list[int]]) -> torch.Tensor:
    answers = engine.generate(rows, SamplingParams(max_tokens=4, temperature=0.0, logprobs=0, prompt_logprobs=0))
    return torch.tensor([found.logprob for answer in answers for found in answer.prompt_logprobs])


@pytest.mark.parametrize("bind", BINDS)
@pytest.mark.parametrize("architecture", list(SWITCHED))
def test_layers_by_chains_are_as_near_to_fp32_as_transformers_own(architecture, bind, monkeypatch) -> None:
    rows = prompts(30, 18, 7)
    wide = half(architecture).float()
    with torch.inference_mode():
        logits = [wide(torch.tensor([row]), use_cache=False).logits[0].log_softmax(-1) for row in rows]
    want = torch.cat(
        [x[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0] for x, row in zip(logits, rows, strict=True)]
    )
    monkeypatch.setattr(faster, "choose_linear", lambda device, dtype: None)
    plain = engine_of(architecture, monkeypatch, None)
    chained = engine_of(architecture, monkeypatch, bind())
    assert count(plain.adapters._model) == (0, 0)
    assert count(chained.adapters._model) == SWITCHED[architecture]
    ours, torchs = (float((prompt_logprobs(engine, rows) - want).norm()) for engine in (chained, plain))
    assert ours <= 1.5 * torchs


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
def test_weights_laid_one_behind_the_other_change_no_bit_and_are_held_once(architecture, monkeypatch) -> None:
    rows = prompts(30, 18, 7)
    monkeypatch.setattr(faster, "choose_linear", lambda device, dtype: None)
    plain = engine_of(architecture, monkeypatch, bind_chain_reference)
    monkeypatch.setattr(blocks, "joins_weights", lambda device: True)
    joined = engine_of(architecture, monkeypatch, bind_chain_reference)
    assert count(joined.adapters._model) == SWITCHED[architecture]
    assert torch.equal(prompt_logprobs(joined, rows), prompt_logprobs(plain, rows))
    sizes = [bytes_held(engine.adapters._model) for engine in (plain, joined)]
    assert sizes[0] == sizes[1]
    layer = joined.adapters._model.model.layers[0]
    for linears in (
        (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
        (layer.mlp.gate_proj, layer.mlp.up_proj),
    ):
        at = [linear.weight.data_ptr() for linear in linears]
        assert all(b - a == linear.weight.nbytes for a, b, linear in zip(at, at[1:], linears, strict=False))


def bytes_held(model: nn.Module) -> int:
    storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage() for weight in model.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


def test_layers_that_do_not_fit_together_stay_where_they_are() -> None:
    def linear(inputs, *, bias=False, dtype=torch.bfloat16):
        return nn.Linear(inputs, 4, bias=bias, dtype=dtype)

    base = linear(8)
    for other in (linear(6), linear(8, bias=True), linear(8, dtype=torch.float32)):
        before = [layer.weight.data_ptr() for layer in (base, other)]
        assert not lay_together((base, other))
        assert [layer.weight.data_ptr() for layer in (base, other)] == before
    # What lies in a larger memory frees nothing when it moves.
    assert lay_together((base, linear(8)))
    assert not lay_together((base, linear(8)))


class Counted:
    """A chain that counts its calls."""

    calls = 0

    def __call__(self, *args):
        chain = bind_chain_reference(*args)

        def counting(*given):
            self.calls += 1
            return chain(*given)

        return counting


@pytest.fixture
def counted(monkeypatch):
    bind = Counted()
    engine = engine_of("llama", monkeypatch, bind)
    row = prompts(9)
    engine.generate(row, SamplingParams(max_tokens=1))
    bind.calls = 0
    return bind, engine, row


def test_a_hook_at_a_part_of_a_layer_is_called_and_nobody_steps_over_it(counted) -> None:
    bind, engine, row = counted
    layers = engine.adapters._model.model.layers
    seen: list[int] = []
    plain = prompt_logprobs(engine, row)
    handle = layers[1].mlp.up_proj.register_forward_hook(lambda module, args, output: seen.append(1) or 0 * output)
    bind.calls = 0
    engine.generate(row, SamplingParams(max_tokens=1))
    # Two layers in two calls each; the MLP of the other is not whole either.
    assert (bind.calls, len(seen)) == (4, 1)
    assert not torch.equal(prompt_logprobs(engine, row), plain)
    handle.remove()
    assert torch.equal(prompt_logprobs(engine, row), plain)


def test_weights_that_were_exchanged_are_used(counted) -> None:
    bind, engine, row = counted
    layers = engine.adapters._model.model.layers
    layers[0].self_attn.q_proj.weight.data = layers[0].self_attn.q_proj.weight.data.clone()
    layers[1].post_attention_layernorm.weight = nn.Parameter(torch.ones_like(layers[1].post_attention_layernorm.weight))
    engine.generate(row, SamplingParams(max_tokens=1))
    # The MLPs of both are as they were; the third layer takes two calls.
    assert bind.calls == 4


def test_a_forward_that_is_not_the_engines_is_the_layers_own(counted) -> None:
    bind, engine, _ = counted
    model = engine.adapters._model
    x = torch.randn(2, 5, model.config.hidden_size).bfloat16()
    turns = model.model.rotary_emb(x, torch.arange(5)[None])
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        got = model.model.layers[0](x, position_embeddings=turns)
        assert torch.equal(
            got, type(model.model.layers[0]).forward(model.model.layers[0], x, position_embeddings=turns)
        )
    # Its MLP is switched, twice.
    assert bind.calls == 2
