"""Gradients of a sequence computed chunk by chunk against plain transformers, one document at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tests.support.decoders import decoder_config
from tests.support.double import DoublePrecision
from tests.support.live import LiveBytes
from tests.support.packed import (
    gradients_by_transformers,
    num_labels,
    random_batch,
    taken_gradients,
    token_losses_by_transformers,
)
from tests.support.relative import relative_error
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from farspan.activations.tiled import tile_mlps
from farspan.batch import PackedBatch
from farspan.chunked.arena import KvArena, arena_bytes
from farspan.chunked.evaluate import chunked_losses
from farspan.chunked.seco import ChunkedStep
from farspan.errors import ConfigError, ModelError
from farspan.models.attention import use_farspan_attention
from farspan.models.parts import decoder_layers
from farspan.parallel.documents import attend_documents
from farspan.train.loss import PackedLoss
from farspan.verify.shrink import VOCAB, small_model

PACKED = (0, 13, 14, 41, 60)
SLOPE_LAYERS, SLOPE_KV_HEADS, SLOPE_HEAD_DIM = 4, 4, 32
# transformers computes Gemma's norms and Llama 4's rotations in fp32 whatever their type: here in double precision.
IN_DOUBLE = ("gemma2", "llama4_text")


def by_chunks(
    model: PreTrainedModel, batch: PackedBatch, chunk_tokens: int, arena: KvArena | None = None
) -> tuple[float, dict[str, Tensor]]:
    """(loss, every gradient) of one sequence."""
    use_farspan_attention(model)
    step = ChunkedStep(model, chunk_tokens, arena=arena or KvArena())
    shard = step.lay_out(batch.num_tokens).shard(batch, 0)
    loss = step.forward_backward(PackedLoss(model, tile_tokens=7), shard, num_labels(batch))
    return loss.item(), taken_gradients(model)


def largest_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert got.keys() == want.keys()
    return max(relative_error(got[name], want[name]) for name in want)


# A ragged last chunk in both; documents within, across and at the bounds of chunks.
@pytest.mark.parametrize(("chunk_tokens", "bounds"), [(16, PACKED), (25, (0, 60))], ids=["packed", "one document"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "llama4_text", "gpt_neox"])
def test_loss_and_every_gradient_equal_full_backpropagation(
    architecture: str, chunk_tokens: int, bounds: tuple[int, ...]
) -> None:
    batch = random_batch(bounds, VOCAB)
    with DoublePrecision() if architecture in IN_DOUBLE else nullcontext():
        model = small_model(decoder_config(architecture))
        want_loss, want = gradients_by_transformers(model, batch)
        loss, got = by_chunks(model, batch, chunk_tokens)
    assert loss == pytest.approx(want_loss, rel=1e-12)
    assert largest_error(got, want) < 1e-12


def test_smoothed_labels_and_a_z_loss_by_chunks_equal_those_of_the_whole_sequence_and_not_what_is_evaluated() -> None:
    model, batch = small_model(decoder_config("llama")), random_batch(PACKED, VOCAB)
    use_farspan_attention(model)
    loss = PackedLoss(model, tile_tokens=7, label_smoothing=0.1, z_loss=0.01)
    shard = ChunkedStep(model, 60).lay_out(batch.num_tokens).shard(batch, 0)
    want = loss(shard, partial(attend_documents, bounds=PACKED), num_labels(batch))
    want.backward()
    wanted = taken_gradients(model)
    got = ChunkedStep(model, 16).forward_backward(loss, shard, num_labels(batch))
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    assert largest_error(taken_gradients(model), wanted) < 1e-12
    likelihood = chunked_losses(model, batch, 16, tile_tokens=7).sum() / num_labels(batch)
    assert likelihood.item() < want.item() * 0.99


@pytest.mark.parametrize("chunk_tokens", [1, 11, 12])
def test_chunks_of_one_token_and_one_chunk_of_all_equal_full_backpropagation(chunk_tokens: int) -> None:
    model, batch = small_model(decoder_config("llama")), random_batch((0, 3, 11), VOCAB)
    _, want = gradients_by_transformers(model, batch)
    assert largest_error(by_chunks(model, batch, chunk_tokens)[1], want) < 1e-12


def with_adapters() -> PreTrainedModel:
    config = LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["q_proj", "v_proj", "down_proj"])
    return inject_adapter_in_model(config, small_model(decoder_config("llama"))).double()


def upper_half_only() -> PreTrainedModel:
    model = small_model(decoder_config("llama"))
    model.requires_grad_(False)
    decoder_layers(model)[-1].requires_grad_(True)
    return model


def queries_only() -> PreTrainedModel:
    model = small_model(decoder_config("llama"))
    model.requires_grad_(False)
    decoder_layers(model)[0].self_attn.q_proj.requires_grad_(True)
    return model


@pytest.mark.parametrize("make", [with_adapters, upper_half_only, queries_only])
def test_with_frozen_weights_every_wanted_gradient_equals_full_backpropagation(
    make: Callable[[], PreTrainedModel],
) -> None:
    model, batch = make(), random_batch(PACKED, VOCAB)
    _, want = gradients_by_transformers(model, batch)
    assert largest_error(by_chunks(model, batch, 16)[1], want) < 1e-12


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_chunks_of_recomputed_layers_with_tiled_mlps_equal_full_backpropagation(use_reentrant: bool) -> None:
    model, batch = small_model(decoder_config("llama")).train(), random_batch(PACKED, VOCAB)
    _, want = gradients_by_transformers(model, batch)
    tile_mlps(model, decoder_layers(model), 5)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert largest_error(by_chunks(model, batch, 16)[1], want) < 1e-12


def test_one_arena_serves_sequence_after_sequence_and_other_lengths() -> None:
    model, arena = small_model(decoder_config("llama")), KvArena()
    for seed, bounds in ((0, (0, 60)), (1, (0, 60)), (2, (0, 7, 23))):
        batch = random_batch(bounds, VOCAB, seed)
        _, want = gradients_by_transformers(small_model(decoder_config("llama")), batch)
        assert largest_error(by_chunks(model, batch, 16, arena)[1], want) < 1e-12


def test_the_arena_lies_where_its_allocator_says_and_holds_8_bytes_per_head_dim_and_token_in_half_precision() -> None:
    model = small_model(decoder_config("llama")).to(torch.bfloat16)
    made: list[Tensor] = []

    def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made.append(torch.full(shape, torch.nan, dtype=dtype))
        return made[-1]

    arena = KvArena(poisoned)
    _, got = by_chunks(model, random_batch((0, 60), VOCAB), 16, arena)
    text = model.config
    dim = text.hidden_size // text.num_attention_heads
    want = arena_bytes(60, text.num_hidden_layers, text.num_key_value_heads, dim, dim, itemsize=2)
    assert want == 60 * text.num_hidden_layers * 8 * text.num_key_value_heads * dim
    assert arena.num_bytes == sum(x.nbytes for x in made) == want
    assert all(bool(grad.isfinite().all()) for grad in got.values())
    arena.release()
    assert arena.num_bytes == 0


def peak_live_bytes(num_tokens: int, dtype: torch.dtype) -> int:
    """Most bytes of tensors alive in one step by chunks of 32, weights and what was given aside."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=SLOPE_LAYERS, num_attention_heads=8,
        num_key_value_heads=SLOPE_KV_HEADS, head_dim=SLOPE_HEAD_DIM, vocab_size=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    batch = random_batch((0, num_tokens), 32)
    use_farspan_attention(model)
    step, loss = ChunkedStep(model, 32), PackedLoss(model, tile_tokens=32)
    shard = step.lay_out(num_tokens).shard(batch, 0)
    with LiveBytes() as live:
        step.forward_backward(loss, shard, num_labels(batch))
    return live.peak


@pytest.mark.parametrize(("dtype", "num_bytes"), [(torch.float32, 16), (torch.bfloat16, 8)])
def test_memory_grows_by_keys_values_and_their_gradients_per_token_and_by_nothing_else(
    dtype: torch.dtype, num_bytes: int
) -> None:
    slope = (peak_live_bytes(448, dtype) - peak_live_bytes(192, dtype)) / 256
    assert slope == pytest.approx(num_bytes * SLOPE_KV_HEADS * SLOPE_HEAD_DIM * SLOPE_LAYERS, rel=0.01)


@pytest.mark.gpu
def test_on_a_gpu_an_arena_in_pinned_host_memory_gives_what_one_on_the_device_gives() -> None:
    batch = random_batch(PACKED, VOCAB)
    tensors = (x.cuda() for x in (batch.tokens_T, batch.labels_T, batch.positions_T))
    on_device = PackedBatch(*tensors, bounds=batch.bounds, sample_ids=batch.sample_ids)

    def pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    found = []
    for allocate in (None, pinned):
        model = small_model(decoder_config("llama")).float().cuda()
        found.append(by_chunks(model, on_device, 16, KvArena(allocate))[1])
    assert largest_error(found[1], found[0]) < 1e-5
    want = gradients_by_transformers(small_model(decoder_config("llama")).float(), batch)[1]
    assert largest_error({name: grad.cpu() for name, grad in found[0].items()}, want) < 1e-3


def test_gradients_summed_in_fp32_round_no_more_than_in_half_precision() -> None:
    exact = small_model(decoder_config("llama"))
    batch = random_batch((0, 60), VOCAB)
    _, want = gradients_by_transformers(exact, batch)
    errors = {}
    for dtype in (torch.bfloat16, torch.float32):
        half = small_model(decoder_config("llama")).to(torch.bfloat16)
        _, got = by_chunks(half, batch, 4, KvArena(gradient_dtype=dtype))
        errors[dtype] = largest_error(got, want)
    assert errors[torch.float32] <= 1.05 * errors[torch.bfloat16]


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("chunk_tokens", [16, 100])
def test_losses_of_tokens_by_chunks_equal_one_forward(architecture: str, chunk_tokens: int) -> None:
    model, batch = small_model(decoder_config(architecture)), random_batch(PACKED, VOCAB)
    with torch.no_grad():
        want_T = token_losses_by_transformers(model, batch)
    use_farspan_attention(model)
    arena = KvArena()
    got_T = chunked_losses(model, batch, chunk_tokens, tile_tokens=7, arena=arena)
    assert relative_error(got_T, want_T) < 1e-12
    text = model.config
    dim = text.hidden_size // text.num_attention_heads
    want = arena_bytes(60, text.num_hidden_layers, text.num_key_value_heads, dim, dim, 8, gradient_itemsize=0)
    assert arena.num_bytes == (0 if chunk_tokens >= 60 else want)


def refused(model: PreTrainedModel, **settings: Any) -> ChunkedStep:
    return ChunkedStep(model, 16, **settings)


def test_what_chunks_cannot_carry_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"recurrent layers.*memory.chunk=none"):
        refused(small_model(decoder_config("qwen3_next")))
    dropping = small_model(decoder_config("llama"))
    dropping.extra = nn.Dropout(0.1)
    with pytest.raises(ModelError, match=r"extra drops activations with p = 0.1"):
        refused(dropping)
    with pytest.raises(ConfigError, match=r"memory.chunk_tokens: must be a multiple"):
        ChunkedStep(small_model(decoder_config("llama")), 0).lay_out(16)
