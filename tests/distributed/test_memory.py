"""Offload and 8-bit states over FSDP2: the same bits, states that move between numbers of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.support.corpus import small_corpus
from tests.support.ranks import RankPool
from tests.support.runs import tiny_run
from tests.support.whole import whole_of
from tests.unit.activations.tiny import CAPACITY, CPU, tiny_llama, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaForCausalLM

from farspan.activations.memo_tokens import memo_contexts
from farspan.activations.offload import ActivationOffload
from farspan.config.schema import RunConfig
from farspan.memory.host import DramTier
from farspan.optim.host import HostOptimizer
from farspan.optim.make import clip_grad_norm, make_optimizer
from farspan.optim.shards import local_of
from farspan.parallel.shard import shard_weights
from farspan.train.build import build
from farspan.train.states import gather_states, scatter_states


@dataclass
class Settings:
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95


def sharded(width: int, recompute: bool = False) -> Any:
    model = tiny_llama(layers=2, width=width)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shard_weights(model, list(model.model.layers), mesh, torch.float32)
    return model


def groups(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


def step(model: Any, optimizer: torch.optim.Optimizer, number: int, passes: int) -> None:
    for part in range(passes):
        ids = tokens(100 * number + 10 * part + dist.get_rank())
        (model(input_ids=ids, labels=ids).loss / passes / dist.get_world_size()).backward()
    clip_grad_norm(optimizer, model.parameters(), 0.05)
    optimizer.step()
    optimizer.zero_grad()


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole_of(p).detach() for name, p in model.named_parameters()}


def stepped(kind: str, offload: str, passes: int, width: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights after 4 steps, whole states on rank 0)."""
    model = sharded(width)
    optimizer = make_optimizer(groups(model), Settings(), kind=kind, offload=offload)
    for number in range(4):
        step(model, optimizer, number, passes)
    states = gather_states(model, optimizer)
    if isinstance(optimizer, HostOptimizer):
        local = sum(local_of(p).numel() * 4 for p in model.parameters())
        # Weights went to the host once, gradients in every pass, and nothing else.
        assert optimizer._tier.stats().stored_bytes == local * (1 + 4 * passes)
        optimizer.close()
    return whole_weights(model), states


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("kind", "passes", "width"), [("adamw", 1, 32), ("adamw", 2, 32), ("adamw8bit", 2, 256)])
def test_an_offloaded_optimizer_over_shards_makes_the_same_bits(
    ranks: RankPool, kind: str, passes: int, width: int
) -> None:
    here = ranks.run(stepped, 2, kind, "none", passes, width)
    away = ranks.run(stepped, 2, kind, "cpu", passes, width)
    assert all(same(a[0], b[0]) for a, b in zip(here, away, strict=True))
    assert here[0][1]
    assert same(here[0][1], away[0][1])


def gathered(kind: str, width: int) -> dict[str, Tensor]:
    model = sharded(width)
    optimizer = make_optimizer(groups(model), Settings(), kind=kind)
    # Gradients that are the same on any number of ranks: only then can states be.
    for p in model.parameters():
        p.grad = torch.ones_like(p) * 0.1 * torch.sign(p)
    optimizer.step()
    return gather_states(model, optimizer)


def scattered(kind: str, offload: str, width: int, states: dict[str, Tensor]) -> dict[str, Tensor]:
    model = sharded(width)
    optimizer = make_optimizer(groups(model), Settings(), kind=kind, offload=offload)
    # Tensors from the test's process are its own memory, and the optimizer will step in them.
    mine = {key: value.clone() for key, value in states.items()} if dist.get_rank() == 0 else {}
    scatter_states(model, optimizer, mine)
    again = gather_states(model, optimizer)
    step(model, optimizer, 0, 1)
    if isinstance(optimizer, HostOptimizer):
        optimizer.close()
    return again


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize(("kind", "width"), [("adamw", 32), ("adamw8bit", 256)])
def test_states_are_the_same_on_any_number_of_ranks_and_move_between_them(
    ranks: RankPool, kind: str, width: int, offload: str
) -> None:
    states = ranks.run(gathered, 2, kind, width)[0]
    assert same(states, ranks.run(gathered, 1, kind, width)[0])
    assert any(key.endswith("_codes") for key in states) == (kind == "adamw8bit")
    assert same(ranks.run(scattered, 1, kind, offload, width, states)[0], states)
    assert same(ranks.run(scattered, 2, kind, offload, width, states)[0], states)


def gradients_with(offloaded: bool, recompute: bool) -> tuple[dict[str, Tensor], int]:
    model = sharded(32, recompute)
    tier = DramTier(CAPACITY)
    offload = ActivationOffload(tier, model, list(model.model.layers), CPU, min_bytes=512, keep_last=0, debug=True)
    ids = tokens(dist.get_rank())
    if offloaded:
        with offload.step():
            model(input_ids=ids, labels=ids).loss.backward()
    else:
        model(input_ids=ids, labels=ids).loss.backward()
    found = {name: whole_of(p.grad) for name, p in model.named_parameters()}
    offload.close()
    tier.close()
    return found, offload.report.stored_bytes


@pytest.mark.parametrize("recompute", [False, True])
def test_offloaded_activations_over_shards_give_the_same_bits_and_no_gathered_weight_moves(
    ranks: RankPool, recompute: bool
) -> None:
    want = ranks.run(gradients_with, 2, False, recompute)
    found = ranks.run(gradients_with, 2, True, recompute)
    assert all(same(a[0], b[0]) for a, b in zip(want, found, strict=True))
    if recompute:
        # The inputs of two layers, 24 tokens of 32 fp32 each: weights gathered by FSDP2 are not among them.
        assert {moved for _, moved in found} == {2 * 24 * 32 * 4}
    else:
        (moved,) = {moved for _, moved in found}
        assert moved > 2 * 24 * 32 * 4


def run_gradients(
    config: RunConfig, cache: str, where: str, alpha: float | None = None
) -> tuple[dict[str, Tensor], int]:
    """Gradients of the first step of a real run, and the bytes that left."""
    step = build(config, CPU, Path(cache)).step
    layers = [m for m in step.loss.modules() if type(m).__name__.endswith("LlamaDecoderLayer")]
    assert len(layers) == config.model.settings["num_hidden_layers"]
    tier, moved = DramTier(CAPACITY), 0
    if where == "none":
        step.backward()
    else:
        offload = ActivationOffload(tier, step.loss, layers, CPU, debug=True, min_bytes=256)
        if alpha is not None:
            (model,) = (m for m in step.loss.modules() if isinstance(m, LlamaForCausalLM))
            contexts = memo_contexts(offload, alpha)
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
        with offload.step():
            step.backward()
        moved = offload.report.stored_bytes
        offload.close()
    tier.close()
    return {n: whole_of(p.grad) for n, p in step.loss.named_parameters()}, moved


@pytest.mark.parametrize("recompute", ["true", "false"])
def test_a_run_with_offload_computes_the_same_bits(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, recompute: str
) -> None:
    corpus = small_corpus(tmp_path_factory.mktemp("memory"))
    options = ["parallel.workers=2", "parallel.sp=2", "parallel.strategy=ring", "train.accumulation=2"]
    config = tiny_run(corpus, str(tmp_path / "run"), *options, f"train.recompute={recompute}")
    want = ranks.run(run_gradients, 2, config, str(tmp_path / "cache"), "none")
    found = ranks.run(run_gradients, 2, config, str(tmp_path / "cache"), "cpu")
    assert all(same(a[0], b[0]) for a, b in zip(want, found, strict=True))
    assert all(moved > 0 for _, moved in found)


def test_a_run_that_swaps_tokens_computes_the_same_bits_and_moves_more_with_more_of_them(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    corpus = small_corpus(tmp_path_factory.mktemp("memory"))
    options = ["parallel.workers=2", "parallel.sp=2", "train.recompute=true"]
    config = tiny_run(corpus, str(tmp_path / "run"), *options)
    want = ranks.run(run_gradients, 2, config, str(tmp_path / "cache"), "none")
    moves = []
    for alpha in (0.0, 1.0):
        found = ranks.run(run_gradients, 2, config, str(tmp_path / "cache"), "cpu", alpha)
        assert all(same(a[0], b[0]) for a, b in zip(want, found, strict=True))
        moves.append(found[0][1])
    assert moves[0] < moves[1]
