"""What `farspan bench parallel` sets side by side: each strategy, DeepSpeed's Ulysses wrapper, one process.

Shapes: T tokens of the sequence, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.parallel.documents import attend_documents
from farspan.parallel.layout import ContiguousLayout, Layout
from farspan.parallel.mesh import make_mesh
from farspan.parallel.strategy import STRATEGIES, SequenceParallel, SequenceRanks, bytes_sent
from farspan.parallel.traffic import Block
from farspan.parallel.wire import WireBytes

ONE_PROCESS, PEER = "one process", "deepspeed ulysses"


@dataclass(frozen=True, slots=True)
class BenchCase:
    """One sequence: its documents, and the heads of one layer."""

    bounds: tuple[int, ...]
    num_q_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64

    @property
    def num_tokens(self) -> int:
        return self.bounds[-1]

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass
class Contender:
    """One way to compute forward and backward on this rank; `sent` gives the bytes this rank sends in one more run."""

    name: str
    run: Callable[[], list[Tensor]]
    layout: Layout | None
    sent: Callable[[], int] | None
    formula: int | None


def make_tensors(case: BenchCase) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (case.num_q_heads, case.num_kv_heads, case.num_kv_heads, case.num_q_heads)
    return [torch.randn(case.num_tokens, h, case.head_dim, generator=generator) for h in heads]


def our_contenders(case: BenchCase, tensors: list[Tensor]) -> list[Contender]:
    num_ranks = dist.get_world_size()
    block = Block(
        case.num_tokens // num_ranks,
        case.num_q_heads,
        case.num_kv_heads,
        case.head_dim,
        case.head_dim,
        itemsize=4,
    )
    contenders = []
    for name in STRATEGIES:
        num_ulysses = num_ranks if name == "hybrid" else 1
        ranks = SequenceRanks.of(make_mesh("cpu", num_ranks, num_ulysses, timeout_s=600))
        sequence = SequenceParallel(ranks, name)
        layout = sequence.lay_out(case.num_tokens, case.bounds)
        attention = sequence.attention(layout, case.bounds)
        held = [layout.take(x, ranks.all.rank) for x in tensors]

        def run(attention: Any = attention, held: list[Tensor] = held) -> list[Tensor]:
            return _with_gradients(lambda q, k, v: attention(q, k, v, scale=case.scale), held)

        def sent(ranks: SequenceRanks = ranks, run: Callable[[], list[Tensor]] = run) -> int:
            before = ranks.all.bytes_sent
            run()
            return ranks.all.bytes_sent - before

        formula = sum(bytes_sent(name, block, num_ranks, num_ulysses))
        contenders.append(Contender(name, run, layout, sent, formula))
    return contenders


def one_process(case: BenchCase, tensors: list[Tensor]) -> Contender:
    """Rank 0 alone with everyone's threads; its partner waits."""

    def run() -> list[Tensor]:
        torch.set_num_threads(dist.get_world_size())
        try:
            return attend_alone(case, tensors)
        finally:
            torch.set_num_threads(1)

    def idle() -> list[Tensor]:
        return []

    return Contender(ONE_PROCESS, run if dist.get_rank() == 0 else idle, None, None, None)


def attend_alone(case: BenchCase, tensors: list[Tensor]) -> list[Tensor]:
    return _with_gradients(lambda q, k, v: attend_documents(q, k, v, case.bounds, case.scale), tensors)


def peer_contenders(case: BenchCase, tensors: list[Tensor]) -> tuple[list[Contender], str]:
    """DeepSpeed's wrapper around torch's attention, or why it is not measured."""
    if len(case.bounds) > 2:
        return [], "its wrapper does not know documents: they would attend to each other"
    if importlib.util.find_spec("deepspeed") is None:
        return [], "deepspeed is not installed; pip install 'farspan[deepspeed]'"
    problem = _start_deepspeed()
    if problem is not None:
        return [], problem
    from deepspeed.sequence.layer import DistributedAttention

    num_ranks = dist.get_world_size()
    layout = ContiguousLayout(case.num_tokens, num_ranks)
    held = [layout.take(x, dist.get_rank()).unsqueeze(0) for x in tensors]

    def local(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTGD, v_BTGD))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=case.scale, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous()

    wrapper = DistributedAttention(local, dist.group.WORLD, scatter_idx=2, gather_idx=1)

    def run() -> list[Tensor]:
        return [x[0] for x in _with_gradients(lambda q, k, v: wrapper(q, k, v, 0), held)]

    def sent() -> int:
        with WireBytes(num_ranks) as wire:
            run()
        return wire.bytes_sent

    numbers = sum(x.numel() for x in held) // num_ranks
    return [Contender(PEER, run, layout, sent, 2 * numbers * 4 * (num_ranks - 1))], ""


def _start_deepspeed() -> str | None:
    """Why DeepSpeed could not start on every rank; it compiles an extension first, which may fail."""
    problem = None
    try:
        with warnings.catch_warnings(action="ignore"):
            import deepspeed

            deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    except Exception as found:
        problem = f"{type(found).__name__}: {found}".splitlines()[0]
    # A contender runs on all ranks or on none: a rank that is ready must not wait for one that is not.
    failed = torch.tensor(0.0 if problem is None else 1.0)
    dist.all_reduce(failed)
    return (problem or "deepspeed did not start on the other rank") if failed > 0 else None


def _with_gradients(attend: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """[out, dq, dk, dv]."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]
