"""A tiny Llama and the tiers its activations can go to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from farspan.activations.offload import ActivationOffload
from farspan.memory.emulated import EmulatedTier, Shape
from farspan.memory.host import DramTier
from farspan.memory.nvme import NvmeTier
from farspan.memory.tier import Tier

CPU = torch.device("cpu")
CAPACITY = 64 << 20
MIN_BYTES = 512
TIERS: dict[str, Callable[[Path], Tier]] = {
    "dram": lambda folder: DramTier(CAPACITY),
    "nvme": lambda folder: NvmeTier(folder, CAPACITY, num_threads=1),
    "emulated cxl": lambda folder: EmulatedTier("cxl", "cxl", CAPACITY, Shape(5e9, 5e9, 1e-6)),
}


def tiny_llama(
    layers: int = 3, dtype: torch.dtype = torch.float32, width: int = 32, **settings: object
) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=min(2 * width, 256),
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=128,
        use_cache=False,
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype).train()


def tokens(step: int, length: int = 24) -> Tensor:
    return torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(step))


def recompute(model: LlamaForCausalLM, context_fn: object = None) -> None:
    extra = {} if context_fn is None else {"context_fn": context_fn}
    model.gradient_checkpointing_enable({"use_reentrant": False, **extra})


def gradients(model: nn.Module, step: int = 0, offload: ActivationOffload | None = None) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    context: AbstractContextManager[None] = offload.step() if offload else nullcontext()
    with context:
        ids = tokens(step)
        model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextmanager
def offloading(tier: Tier, model: LlamaForCausalLM, **options: object) -> Iterator[ActivationOffload]:
    offload = ActivationOffload(tier, model, list(model.model.layers), CPU, **{"min_bytes": MIN_BYTES, **options})
    try:
        yield offload
    finally:
        offload.close()
        tier.close()
