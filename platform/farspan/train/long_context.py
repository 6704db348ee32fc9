"""The longest sequence a training step fits into a fixed memory budget, by farspan and by its peers, in one run.

Every measurement is one forward and backward of the same random Llama over one document, in a process of its own, so
that nobody inherits another's allocator. Its peak is what the process held beyond weights and libraries. Losses and
gradient norms are compared with plain transformers first: a wrong step has no length.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from farspan.activations.tiled import tile_mlps
from farspan.batch import IGNORED_LABEL, ShardedBatch
from farspan.chunked.seco import ChunkedStep
from farspan.errors import ClusterError
from farspan.kernels.peak import peak_bytes_of
from farspan.models.attention import use_farspan_attention
from farspan.models.parts import decoder_layers
from farspan.parallel.documents import attend_documents
from farspan.train.apart import ask_apart
from farspan.train.limit import memory_limit
from farspan.train.loss import PackedLoss
from farspan.train.rescue import is_out_of_memory

logger = logging.getLogger(__name__)

PLAIN, CHECKPOINTED, ALST = "transformers", "transformers + checkpointing", "deepspeed ALST pieces"
WHOLE, TILES = "farspan, one tile", "farspan tiles"
RECOMPUTE, SECO = "farspan tiles + recompute", "farspan tiles + chunks"
PEERS, OURS = (PLAIN, CHECKPOINTED, ALST), (WHOLE, TILES, RECOMPUTE, SECO)
_TILE_TOKENS, _CHUNK_TOKENS, _WARM_TOKENS = 128, 512, 64
_DEADLINE_S, _CHECK_TOKENS = 900.0, 320
# Steps that are compared are repeated for this long, and the fastest counts.
_TIMED_S = 4.0


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder with many query heads for each key head, as long-context models have."""

    width: int = 256
    layers: int = 4
    q_heads: int = 8
    kv_heads: int = 1
    vocab_size: int = 16384
    threads: int = 2


@dataclass(frozen=True, slots=True)
class Measured:
    """One step. `peak_bytes` is None when memory did not suffice at all."""

    peak_bytes: int | None
    seconds: float = math.inf
    loss: float = math.nan
    grad_norm: float = math.nan


def bench_long_context(
    budget_mib: int = 256, shape: Shape | None = None, most_tokens: int = 32768
) -> list[dict[str, Any]]:
    """Rows: the longest sequence of each contender, then farspan's speed beside each peer's at the peer's longest.

    Lengths are found to one part in eight. `most_tokens` ends the search; a row that reached it says so.

    Raises:
        ClusterError: a contender's process died or hung, or does not compute the same step.
    """
    shape, budget = shape or Shape(), budget_mib << 20
    contenders = [name for name in PEERS if name != ALST or _has_deepspeed()]
    _refuse_different([*contenders, *OURS], shape)
    longest, rows, start = {}, [], 256
    for name in [*contenders, SECO]:
        tokens, measured = _longest(name, shape, budget, start, most_tokens)
        longest[name], start = tokens, max(start, tokens)
        rows.append(_length_row(name, tokens, measured, budget_mib, most_tokens))
    best = max(longest[name] for name in contenders)
    for row in rows:
        row["of plain"] = longest[row["contender"]] / longest[PLAIN]
        row["of best peer"] = longest[row["contender"]] / best
    return rows + [_speed_row(name, longest[name], shape, budget) for name in contenders]


def _length_row(name: str, tokens: int, measured: Measured, budget_mib: int, most_tokens: int) -> dict[str, Any]:
    return {
        "contender": name,
        "budget_mib": budget_mib,
        "longest_tokens": tokens,
        "peak_mib": (measured.peak_bytes or 0) >> 20,
        "tokens_per_s": tokens / measured.seconds,
        **({"note": "the search ended here"} if tokens >= most_tokens else {}),
    }


def _speed_row(peer: str, tokens: int, shape: Shape, budget: int) -> dict[str, Any]:
    """farspan's fastest way that fits, beside a peer, at the peer's longest length; they take turns."""
    seconds: dict[str, float] = dict.fromkeys((peer, *OURS), math.inf)
    for _ in range(2):
        for name in seconds:
            measured = measure(name, shape, tokens, budget, _TIMED_S)
            if name == peer or (measured.peak_bytes is not None and measured.peak_bytes <= budget):
                seconds[name] = min(seconds[name], measured.seconds)
    ours = min(OURS, key=lambda name: seconds[name])
    return {"peer": peer, "tokens": tokens, "farspan": ours, "speed of farspan / peer": seconds[peer] / seconds[ours]}


def _longest(name: str, shape: Shape, budget: int, start: int, most_tokens: int) -> tuple[int, Measured]:
    fits, best, too_long = 0, Measured(None), most_tokens * 2
    tokens = start
    while tokens <= most_tokens and (tokens - fits) * 8 >= fits:
        measured = measure(name, shape, tokens, budget)
        if measured.peak_bytes is not None and measured.peak_bytes <= budget:
            fits, best = tokens, measured
        else:
            too_long = tokens
        middle = (fits + too_long) // 2 if too_long <= most_tokens else min(2 * fits, most_tokens)
        tokens = middle // 64 * 64
        if tokens <= fits:
            break
    return fits, best


def measure(name: str, shape: Shape, num_tokens: int, budget: int, timed_s: float = 0.0) -> Measured:
    """One contender's step in a process of its own; the fastest of those that begin within `timed_s`.

    Raises:
        ClusterError: the process died or hung.
    """
    what = f"{name} at {num_tokens} tokens"
    found = ask_apart(_in_process, (name, shape, num_tokens, budget, timed_s), what, _DEADLINE_S)
    assert isinstance(found, Measured), "the process sends what it measured"
    logger.info("%s", _told(what, found))
    return found


def _told(what: str, found: Measured) -> str:
    if found.peak_bytes is None:
        return f"{what}: memory did not suffice"
    return f"{what}: {found.peak_bytes >> 20} MiB, {found.seconds:.1f} s"


def _in_process(pipe: Connection, name: str, shape: Shape, num_tokens: int, budget: int, timed_s: float) -> None:
    torch.set_num_threads(shape.threads)
    model = _model(shape, max(num_tokens, _WARM_TOKENS))
    step = contender(name, model)
    # What libraries set up at first use is not what a step costs.
    step(_document(min(_WARM_TOKENS, num_tokens), shape))
    model.zero_grad(set_to_none=True)
    document, taken = _document(num_tokens, shape), _Taken()
    try:
        # Twice the budget is far enough from it to stop a step that would take the whole machine.
        with memory_limit(torch.device("cpu"), 2 * budget / 2**30):
            peak = peak_bytes_of(lambda: taken.add(step, document))
            norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
            until = time.perf_counter() + timed_s
            while time.perf_counter() < until:
                model.zero_grad(set_to_none=True)
                taken.add(step, document)
    except (RuntimeError, MemoryError) as problem:
        if not is_out_of_memory(problem):
            raise
        pipe.send(Measured(None))
        return
    pipe.send(Measured(peak, min(taken.seconds), taken.losses[0], norm.item()))


@dataclass(frozen=True, slots=True)
class _Taken:
    """What steps took, and their losses."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def add(self, step: Callable[[ShardedBatch], Tensor], document: ShardedBatch) -> None:
        started = time.perf_counter()
        self.losses.append(step(document).item())
        self.seconds.append(time.perf_counter() - started)


def contender(name: str, model: PreTrainedModel) -> Callable[[ShardedBatch], Tensor]:
    """One contender's step on `model`: document -> loss, gradients left behind."""
    return _STEPS[name](model)


def _plain(model: PreTrainedModel) -> Callable[[ShardedBatch], Tensor]:
    def step(document: ShardedBatch) -> Tensor:
        loss = model(input_ids=document.tokens_T[None], labels=document.tokens_T[None], use_cache=False).loss
        loss.backward()
        return loss.detach()

    return step


def _checkpointed(model: PreTrainedModel) -> Callable[[ShardedBatch], Tensor]:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return _plain(model)


def _alst(model: PreTrainedModel) -> Callable[[ShardedBatch], Tensor]:
    """DeepSpeed's tiled MLP and tiled loss on a checkpointed model, tiles as long as ours."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss, TiledMLP

    for layer in decoder_layers(model):
        mlp = layer.mlp
        assert isinstance(mlp, nn.Module), "a Llama has one"
        mlp.forward = partial(_alst_mlp, TiledMLP, type(mlp).forward, mlp)
    model.gradient_checkpointing_enable({"use_reentrant": False})

    def nll(head: nn.Module, x_tE: Tensor, y_t: Tensor) -> Tensor:
        return nn.functional.cross_entropy(head(x_tE), y_t, ignore_index=IGNORED_LABEL, reduction="sum")

    def step(document: ShardedBatch) -> Tensor:
        hidden_1TE = model.model(input_ids=document.tokens_T[None], use_cache=False).last_hidden_state
        tiles = math.ceil(hidden_1TE.shape[1] / _TILE_TOKENS)
        weights = list(model.lm_head.parameters())
        # Multiplied by 1 / labels afterwards, its head's gradient would be wrong by that factor: divided before.
        num_labels = _num_labels(document)
        scaled = partial(_divided, nll, num_labels)
        loss = TiledFusedLogitsLoss.apply(
            scaled, model.lm_head, hidden_1TE, document.labels_T[None], None, tiles, weights, "sum"
        )
        loss.backward()
        return loss.detach()

    return step


def _alst_mlp(tiled: Any, own: Callable[..., Tensor], mlp: nn.Module, x_1TE: Tensor) -> Tensor:
    tiles = math.ceil(x_1TE.shape[-2] / _TILE_TOKENS)
    return cast(Tensor, tiled.apply(own, mlp, x_1TE, tiles, list(mlp.parameters())))


def _divided(nll: Callable[..., Tensor], num_labels: Tensor, *inputs: Any) -> Tensor:
    return nll(*inputs) / num_labels


def _ours(
    model: PreTrainedModel, *, tile_loss: bool = True, recompute: bool = False, chunks: bool = False
) -> Callable[[ShardedBatch], Tensor]:
    use_farspan_attention(model)
    if recompute or chunks:
        tile_mlps(model, decoder_layers(model), _TILE_TOKENS)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_of = PackedLoss(model, _TILE_TOKENS if tile_loss else model.config.max_position_embeddings)
    if chunks:
        chunked = ChunkedStep(model, _CHUNK_TOKENS)
        return lambda document: chunked.forward_backward(loss_of, document, _num_labels(document))

    def step(document: ShardedBatch) -> Tensor:
        loss = loss_of(document, partial(attend_documents, bounds=document.bounds), _num_labels(document))
        loss.backward()
        return loss.detach()

    return step


_STEPS: dict[str, Callable[[PreTrainedModel], Callable[[ShardedBatch], Tensor]]] = {
    PLAIN: _plain,
    CHECKPOINTED: _checkpointed,
    ALST: _alst,
    WHOLE: partial(_ours, tile_loss=False),
    TILES: _ours,
    RECOMPUTE: partial(_ours, recompute=True),
    SECO: partial(_ours, chunks=True),
}


def _model(shape: Shape, positions: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=3 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.q_heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).train()


def _document(num_tokens: int, shape: Shape) -> ShardedBatch:
    tokens_T = torch.randint(shape.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens))
    labels_T = tokens_T.roll(-1)
    labels_T[-1] = IGNORED_LABEL
    return ShardedBatch(tokens_T, labels_T, torch.arange(num_tokens), bounds=(0, num_tokens))


def _num_labels(document: ShardedBatch) -> Tensor:
    return (document.labels_T != IGNORED_LABEL).sum()


def _refuse_different(names: list[str], shape: Shape) -> None:
    """A contender that computes another step cannot be compared."""
    plain = measure(PLAIN, shape, _CHECK_TOKENS, 1 << 33)
    for name, value, want in _differences(names, shape, plain):
        raise ClusterError(f"{name} computes {value:g} where {PLAIN} computes {want:g}: it is not the same step")


def _differences(names: list[str], shape: Shape, plain: Measured) -> Iterator[tuple[str, float, float]]:
    for name in names:
        found = measure(name, shape, _CHECK_TOKENS, 1 << 33)
        for value, want in ((found.loss, plain.loss), (found.grad_norm, plain.grad_norm)):
            if not math.isclose(value, want, rel_tol=1e-4):
                yield name, value, want


def _has_deepspeed() -> bool:
    import importlib.util

    return importlib.util.find_spec("deepspeed") is not None
