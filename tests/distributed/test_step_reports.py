"""What a step tells of time and memory: waits of known links, bytes of known arenas, nothing where there is none."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.support.corpus import small_corpus
from tests.support.engines import build_here
from tests.support.ranks import RankPool
from tests.support.runs import TINY, tiny_run
from torch import Tensor

from farspan.chunked.arena import arena_bytes
from farspan.config.schema import RunConfig
from farspan.optim.shards import local_of
from farspan.parallel.exchange import Counter, Exchange, Transfer
from farspan.parallel.layout import make_layout
from farspan.parallel.pairs import PairTable
from farspan.parallel.ring import RingAttention
from farspan.parallel.waits import Waits
from farspan.telemetry.events import StepReport
from farspan.train.build import build

CPU = torch.device("cpu")
LINK_S = 0.25
# The kernel adds up a process's pages roughly: what is resident may look larger than the most that ever was.
ROUGHLY = 16 << 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_corpus(tmp_path_factory.mktemp("reports"))


@dataclass
class Clock:
    """Stands still unless somebody waits for a link."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass(frozen=True)
class LinkWork:
    """A message that arrives when the other rank has sent it, and by the clock not before `at_s`."""

    work: dist.Work
    clock: Clock
    at_s: float

    def wait(self) -> bool:
        done = self.work.wait()
        self.clock.now_s = max(self.clock.now_s, self.at_s)
        return done


@dataclass
class SlowLink(Exchange):
    """Every message takes LINK_S, however long it is."""

    clock: Clock = field(kw_only=True)

    def pass_on(self, tensors: Sequence[Tensor], distance: int = 1) -> Transfer:
        sent = super().pass_on(tensors, distance)
        works = [LinkWork(work, self.clock, self.clock.now_s + LINK_S) for work in sent.works]
        return Transfer(works, sent.arriving, sent.leaving, sent.waits)  # type: ignore[arg-type]


def ring_waits(num_tokens: int) -> tuple[float, float]:
    """(waited in forward, in backward) of this rank in a ring whose computation takes no time by the clock."""
    clock = Clock()
    exchange = SlowLink(dist.group.WORLD, Counter(waits=Waits(clock)), clock=clock)
    table = PairTable.of(make_layout("zigzag", num_tokens, exchange.num_ranks, (0, num_tokens)), (0, num_tokens))
    tokens = num_tokens // exchange.num_ranks
    q, k, v = (torch.randn(tokens, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    waits = exchange.counter.waits
    out = RingAttention(exchange, table)(q, k, v, scale=0.25)
    forward = waits.seconds()
    waits.begin()
    out.sum().backward()
    return forward, waits.seconds()


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_ring_waits_for_its_slow_link_once_a_hop_and_in_backward_once_more_for_the_way_home(
    ranks: RankPool, num_ranks: int
) -> None:
    # In backward keys and gradients of a hop travel at once: their links are waited for together.
    want = ((num_ranks - 1) * LINK_S, num_ranks * LINK_S if num_ranks > 1 else 0.0)
    assert ranks.run(ring_waits, num_ranks, 32) == [want] * num_ranks


class Asked(Waits):
    """Remembers what it answered."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[float] = []

    def seconds(self) -> float:
        self.answers.append(super().seconds())
        return self.answers[-1]


@dataclass(frozen=True)
class Told:
    """A step's report, and what this rank's own owners count."""

    report: StepReport
    waited_s: float
    pooled_bytes: int
    optimizer_bytes: int


def first_step(config: RunConfig, cache: str) -> Told:
    step = build(config, CPU, Path(cache)).step
    waits = step.exchange.counter.waits = Asked()
    report = step.run(0)
    (waited_s,) = waits.answers
    pooled = 0
    if step.offload is not None:
        pooled = sum(region.held_bytes for region in step.offload._offload.store.pool._idle)
    weights = [local_of(p) for p in step.loss.parameters()]
    page = mmap.PAGESIZE
    # A master, a gradient and two moments of each weight in whole pages; beside them the number of steps.
    optimizer = sum(4 * -(-max(1, w.nbytes) // page) * page + 4 for w in weights)
    step.close()
    return Told(report, waited_s, pooled, optimizer)


def test_a_step_tells_what_its_ranks_waited_and_what_their_pools_and_optimizers_hold(
    ranks: RankPool, corpus: str, tmp_path: Path
) -> None:
    (disk := tmp_path / "disk").mkdir()
    config = tiny_run(
        corpus, str(tmp_path / "run"), "parallel.workers=2", "parallel.sp=2", "parallel.strategy=ring",
        "data.sequence_tokens=1024", "memory.offload_activations=nvme", f"memory.tiers=['nvme:{disk}:32MiB']",
        "weights.offload_optimizer=cpu",
    )  # fmt: skip
    told = ranks.run(first_step, 2, config, str(tmp_path / "cache"))
    report = told[0].report
    assert report.nvme_bytes == max(one.pooled_bytes for one in told) > 0
    assert report.dram_bytes == max(one.optimizer_bytes for one in told)
    assert (report.cxl_bytes, report.emulated_cxl_bytes) == (0, 0)
    assert 0 < report.device_bytes < report.peak_memory_bytes + ROUGHLY
    waited = [one.waited_s for one in told]
    assert all(0 < one.waited_s < one.report.step_s for one in told)
    for one in told:
        assert (one.report.exposed_s, one.report.exposed_max_s) == (sum(waited) / 2, max(waited))


def with_zero(config: RunConfig, cache: str) -> tuple[StepReport, int]:
    """(report of the first step, weights of the whole model)."""
    step = build_here(config, cache).step
    num_weights = sum(getattr(p, "ds_numel", p.numel()) for p in step.loss.parameters())
    return step.run(0), num_weights


@pytest.mark.parametrize("stage", [2, 3])
def test_what_deepspeed_offloads_is_told_as_dram(ranks: RankPool, corpus: str, tmp_path: Path, stage: int) -> None:
    engine = ["weights.engine=deepspeed", f"weights.zero={stage}", "weights.offload_optimizer=cpu"]
    config = tiny_run(corpus, str(tmp_path / "run"), "parallel.workers=2", "model.dtype=float32", *engine)
    (report, num_weights), _ = ranks.run(with_zero, 2, config, str(tmp_path / "cache"))
    # Half of the fp32 weights and two moments of each; DeepSpeed pads what it cuts.
    least = 3 * 4 * num_weights / 2
    assert least <= report.dram_bytes < 1.1 * least


@pytest.mark.parametrize(
    ("place", "tier", "field"), [("cpu", "dram:1MiB", "dram_bytes"), ("cxl", "cxl:emulated:1MiB", "emulated_cxl_bytes")]
)
def test_the_arena_of_a_run_in_one_process_is_told_in_its_tier_and_nobody_was_waited_for(
    ranks: RankPool, corpus: str, tmp_path: Path, place: str, tier: str, field: str
) -> None:
    chunks = ["memory.chunk=seco", "memory.chunk_tokens=16", f"memory.offload_activations={place}"]
    config = tiny_run(corpus, str(tmp_path / "run"), *chunks, f"memory.tiers=['{tier}']")
    (told,) = ranks.run(first_step, 1, config, str(tmp_path / "cache"))
    head_dim = TINY["hidden_size"] // TINY["num_attention_heads"]
    arena = arena_bytes(64, TINY["num_hidden_layers"], TINY["num_key_value_heads"], head_dim, head_dim, 8)
    held = {
        name: getattr(told.report, name) for name in ("dram_bytes", "cxl_bytes", "emulated_cxl_bytes", "nvme_bytes")
    }
    assert held == {**dict.fromkeys(held, 0), field: arena}
    assert (told.report.exposed_s, told.report.exposed_max_s, told.waited_s) == (0.0, 0.0, 0.0)
