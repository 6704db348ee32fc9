"""What one training step costs at a length: peak memory and seconds, by each way of holding less."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from farspan.activations.tiled import tile_mlps
from farspan.batch import IGNORED_LABEL, ShardedBatch
from farspan.chunked.arena import Allocate, KvArena
from farspan.chunked.seco import ChunkedStep
from farspan.errors import ConfigError
from farspan.kernels.peak import peak_bytes_of
from farspan.models.attention import packed_hidden, use_farspan_attention
from farspan.models.parts import decoder_layers, trunk_and_head
from farspan.parallel.documents import attend_documents

MODES = ("plain", "recompute", "tiled", "seco")
_WARM_TOKENS = 64

MakeLoss = Callable[[PreTrainedModel, int], nn.Module]
"""(model, tokens of a loss tile) -> a `PackedLoss`."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """One forward and backward over one document of `num_tokens`."""

    mode: str
    num_tokens: int
    peak_bytes: int | None
    """Most memory held beyond weights and what was held before; none where the system cannot tell."""
    seconds: float
    loss: float


def step_cost(
    mode: str,
    make_model: Callable[[], PreTrainedModel],
    make_loss: MakeLoss,
    num_tokens: int,
    *,
    chunk_tokens: int,
    tile_tokens: int,
    device: torch.device,
    allocate: Allocate | None = None,
) -> StepCost:
    """Measure one step of a fresh model.

    plain: every activation and all logits; recompute: layer inputs only; tiled: the same, MLPs and logits by tiles;
    seco: tiles, and chunks over an arena from `allocate`.

    Raises:
        ConfigError: a mode that is none of MODES.
    """
    if mode not in MODES:
        raise ConfigError("mode", f"must be one of {', '.join(MODES)}", mode, "use tiled")
    model = make_model().to(device).train()
    use_farspan_attention(model)
    if mode in ("tiled", "seco"):
        tile_mlps(model, decoder_layers(model), tile_tokens)
    if mode in ("recompute", "tiled"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    step = _make_step(mode, model, make_loss, chunk_tokens, tile_tokens, allocate)
    # What libraries set up at first use is not what a step costs.
    step(_one_document(min(_WARM_TOKENS, num_tokens), model, device))
    model.zero_grad(set_to_none=True)
    document, found = _one_document(num_tokens, model, device), []
    started = time.perf_counter()
    peak = _peak_bytes(lambda: found.append(step(document).item()), device)
    return StepCost(mode, num_tokens, peak, time.perf_counter() - started, found[0])


def _make_step(
    mode: str,
    model: PreTrainedModel,
    make_loss: MakeLoss,
    chunk_tokens: int,
    tile_tokens: int,
    allocate: Allocate | None,
) -> Callable[[ShardedBatch], Tensor]:
    """A function from one document to its loss, which leaves gradients behind."""
    tiled = make_loss(model, tile_tokens)
    if mode == "seco":
        chunks = ChunkedStep(model, chunk_tokens, arena=KvArena(allocate))
        return lambda document: chunks.forward_backward(tiled, document, _num_labels(document))

    def whole(document: ShardedBatch) -> Tensor:
        attention = partial(attend_documents, bounds=document.bounds)
        if mode == "tiled":
            loss = tiled(document, attention, _num_labels(document))
        else:
            hidden_TE = packed_hidden(model, document.tokens_T, document.positions_T, attention, None)
            logits_TV = trunk_and_head(model)[1](hidden_TE)
            loss = nn.functional.cross_entropy(logits_TV.float(), document.labels_T, ignore_index=IGNORED_LABEL)
        loss.backward()
        return loss.detach()

    return whole


def _num_labels(document: ShardedBatch) -> Tensor:
    return (document.labels_T != IGNORED_LABEL).sum()


def _one_document(num_tokens: int, model: PreTrainedModel, device: torch.device) -> ShardedBatch:
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    tokens_T = torch.randint(vocab_size, (num_tokens,), generator=generator)
    labels_T = tokens_T.roll(-1)
    labels_T[-1] = IGNORED_LABEL
    positions_T = torch.arange(num_tokens, device=device)
    return ShardedBatch(tokens_T.to(device), labels_T.to(device), positions_T, (0, num_tokens))


def _peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    if device.type != "cuda":
        return peak_bytes_of(call)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
