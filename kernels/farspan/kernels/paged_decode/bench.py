"""Our attention over pages beside its peer: the same pool, the same run, checked before it is timed.

The peer gathers the pages of all rows side by side and calls torch's SDPA with a mask, as an engine does without paged
kernels. Contestants take turns in every round, in alternating order, so that a machine whose speed drifts drifts for
all; a ratio is the median of the rounds' ratios. Reading keys and values once is all that decode must do: their bytes
per second are set beside a copy measured in the same rounds. On CUDA a round replays a captured graph of calls over
different layers, so that it times the device and no cache holds what the next call reads.
"""

from __future__ import annotations

import logging
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from farspan.kernels.attention.limits import Ask
from farspan.kernels.paged_decode.contract import AttendPages
from farspan.kernels.paged_decode.dispatch import installed_pages_backends

logger = logging.getLogger(__name__)

_SLOTS = 16
_MIN_ROUNDS, _MAX_ROUNDS, _SECONDS = 4, 30, 2.0
# Largest relative difference from SDPA that two correct kernels show.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
# Gathering copies the pages of all rows: beyond this it is no peer, it is an out-of-memory error.
_LARGEST_GATHER_BYTES = 24 * 1024**3
# Bytes of keys and values a round reads at least: far more than any cache holds.
_ROUND_BYTES = {"cpu": 128 * 1024**2, "cuda": 512 * 1024**2}


@dataclass(frozen=True, slots=True)
class Case:
    rows: int
    tokens: int
    """Of the longest row; `ragged` rows are up to 16 times shorter."""
    dtype: torch.dtype
    heads: int = 32
    groups: int = 8
    head_dim: int = 128
    ragged: bool = False

    def lengths(self) -> list[int]:
        chosen = random.Random(0)
        if not self.ragged:
            return [self.tokens] * self.rows
        return [self.tokens, *(int(self.tokens / 16 ** chosen.random()) for _ in range(self.rows - 1))]


_CPU_CASES = tuple(
    Case(rows, tokens, dtype, 12, 4, 64, ragged)
    for dtype in (torch.float32, torch.bfloat16)
    for rows, tokens, ragged in ((1, 4096, False), (16, 640, False), (16, 4096, True))
)
_CUDA_CASES = (
    *(Case(1, tokens, torch.bfloat16) for tokens in (4096, 32768, 131072)),
    *(Case(64, tokens, torch.bfloat16) for tokens in (2048, 8192)),
    Case(64, 32768, torch.bfloat16, ragged=True),
    Case(64, 8192, torch.bfloat16, 12, 4, 64),
    Case(64, 8192, torch.bfloat16, 32, 32),
)


@dataclass(frozen=True, slots=True)
class Work:
    """One problem over `layers` layers of one pool, block-major as kv/pages.py lays it out."""

    q_BQHD: Tensor
    layers: list[tuple[Tensor, Tensor]]
    tables_BN: Tensor
    lengths_B: Tensor
    scale: float
    read_bytes: int
    """Of keys and values that one layer's attention has to read."""

    def ours(self, attend: AttendPages, layer: int) -> Tensor:
        pages = (*self.layers[layer], self.tables_BN, self.lengths_B)
        return attend(self.q_BQHD, *pages, scale=self.scale)[0]

    def gather_and_sdpa(self, layer: int) -> Tensor:
        k_BGTD, v_BGTD = (x[self.tables_BN].flatten(1, 2).transpose(1, 2) for x in self.layers[layer])
        visible_BT = torch.arange(k_BGTD.shape[2], device=k_BGTD.device) < self.lengths_B[:, None]
        q_BGMD = self.q_BQHD[:, 0].unflatten(1, (k_BGTD.shape[1], -1))
        mask_B11T = visible_BT[:, None, None, :]
        out_BGMD = scaled_dot_product_attention(q_BGMD, k_BGTD, v_BGTD, attn_mask=mask_B11T, scale=self.scale)
        return out_BGMD.flatten(1, 2).unsqueeze(1)


def bench_paged_decode(
    cases: tuple[Case, ...] | None = None, backends: dict[str, AttendPages] | None = None
) -> list[dict[str, Any]]:
    """One row per case and contestant: seconds of one layer, ratio to the peer, achieved bytes/s and their part of a
    copy's. A row whose results disagree with the peer's says so in `wrong` and carries no time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    for case in cases or (_CPU_CASES if device.type == "cpu" else _CUDA_CASES):
        logger.info("%s", case)
        rows += _rows(case, make_work(case, device), backends)
    return rows


def make_work(case: Case, device: torch.device) -> Work:
    lengths = case.lengths()
    counts = [-(-length // _SLOTS) for length in lengths]
    element = case.groups * case.head_dim
    read_bytes = 2 * sum(lengths) * element * case.dtype.itemsize
    num_layers = max(2, min(16, -(-_ROUND_BYTES[device.type] // read_bytes)))
    generator = torch.Generator(device=device).manual_seed(0)
    storage = torch.randn(
        sum(counts), num_layers, 2, _SLOTS, case.groups, case.head_dim,
        generator=generator, device=device, dtype=case.dtype,
    )  # fmt: skip
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).split(counts)
    # Short rows are filled up with a page of their own, as a gathering engine must.
    tables = torch.stack([torch.cat([own, own[:1].expand(max(counts) - len(own))]) for own in order])
    q = torch.randn(case.rows, 1, case.heads, case.head_dim, generator=generator, device=device, dtype=case.dtype)
    layers = [(storage[:, layer, 0], storage[:, layer, 1]) for layer in range(num_layers)]
    lengths_B = torch.tensor(lengths, dtype=torch.int32, device=device)
    return Work(q, layers, tables.to(device, torch.int32), lengths_B, case.head_dim**-0.5, read_bytes)


def _rows(case: Case, work: Work, backends: dict[str, AttendPages] | None) -> list[dict[str, Any]]:
    device = work.q_BQHD.device
    if backends is None:
        backends = installed_pages_backends(Ask.of(work.layers[0][0], work.layers[0][1]))
        # Plain torch computes in fp32 with keys repeated for every head: slower by far, on a GPU by minutes.
        backends.pop("reference", None)
    contestants: dict[str, Callable[[int], Tensor]] = {
        f"farspan {name}": lambda layer, attend=attend: work.ours(attend, layer)  # type: ignore[misc]
        for name, attend in backends.items()
    }
    padded_bytes = 2 * work.tables_BN.numel() * _SLOTS * case.groups * case.head_dim * case.dtype.itemsize
    peer = "gather + sdpa"
    if padded_bytes <= _LARGEST_GATHER_BYTES:
        contestants[peer] = work.gather_and_sdpa
        want = work.gather_and_sdpa(0)
    else:
        want = _row_by_row(work)
    errors = {name: _relative_error(run(0), want) for name, run in contestants.items()}
    copied = torch.empty(_ROUND_BYTES[device.type] // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(copied)
    runs = {name: _over_layers(run, len(work.layers), device) for name, run in contestants.items()}
    # A copy reads and writes every byte.
    runs["copy"] = _over_layers(lambda _: target.copy_(copied), 1, device)
    times = _times(runs, device)
    copy_speed = 2 * copied.numel() / statistics.median(times["copy"])
    rows = []
    for name in contestants:
        row = {**_shape(case), "contestant": name, "error": errors[name]}
        # Not below: a NaN is no success.
        if not errors[name] < _TOLERANCE[case.dtype]:
            rows.append({**row, "wrong": f"differs by {errors[name]:.2g}; allowed {_TOLERANCE[case.dtype]:.2g}"})
            continue
        seconds = statistics.median(times[name]) / len(work.layers)
        speed = work.read_bytes / seconds
        measured = {"seconds": seconds, "bytes_per_second": speed, "of_copy": speed / copy_speed}
        if peer in contestants:
            pairs = zip(times[name], times[peer], strict=True)
            measured["ratio"] = statistics.median(mine / other for mine, other in pairs)
        rows.append({**row, **measured})
    return rows


def _row_by_row(work: Work) -> Tensor:
    """What the peer would compute, without the memory it would need."""
    parts = []
    for row, length in enumerate(work.lengths_B.tolist()):
        pages = work.tables_BN[row, : -(-length // _SLOTS)]
        k_GTD, v_GTD = (x[pages].flatten(0, 1)[:length].transpose(0, 1) for x in work.layers[0])
        q_GMD = work.q_BQHD[row, 0].unflatten(0, (k_GTD.shape[0], -1))
        parts.append(scaled_dot_product_attention(q_GMD[None], k_GTD[None], v_GTD[None], scale=work.scale)[0])
    return torch.stack(parts).flatten(1, 2).unsqueeze(1)


def _shape(case: Case) -> dict[str, Any]:
    return {
        "rows": case.rows,
        "tokens": f"up to {case.tokens}" if case.ragged else case.tokens,
        "dtype": str(case.dtype).removeprefix("torch."),
        "heads": f"{case.heads}:{case.groups}x{case.head_dim}",
    }


def _over_layers(run: Callable[[int], Tensor], num_layers: int, device: torch.device) -> Callable[[], None]:
    """One call per layer; on CUDA captured once, so that replaying it costs the device's time alone."""

    def all_layers() -> None:
        for layer in range(num_layers):
            run(layer)

    all_layers()
    if device.type != "cuda":
        return all_layers
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_layers()
    return graph.replay


def _times(runs: dict[str, Callable[[], None]], device: torch.device) -> dict[str, list[float]]:
    """Seconds of every round per contestant, the order turned round in every second round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + _SECONDS
    for number in range(_MAX_ROUNDS):
        if number >= _MIN_ROUNDS and time.perf_counter() > end:
            break
        for name in list(runs) if number % 2 == 0 else reversed(list(runs)):
            times[name].append(_seconds(runs[name], device))
    return times


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())
