"""Layers of an 8B-shaped Llama without attention, and each of their linear layers, on one GPU: how near to reading?

    python -m farspan.kernels.chain.bench

Everything is captured in graphs over the weights of all layers, which no cache holds, and contestants take turns. The
bound is what a large sum reads in the same run. Shapes: T rows, L layers; other letters: contract.py.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from farspan.kernels.chain.bench_contender import multiply_by_shares
from farspan.kernels.chain.contract import Activation, Add, Chain, Gate, Multiply, Normalize, Rotate, Step
from farspan.kernels.chain.triton import bind_chain_triton
from farspan.kernels.chain.triton_linear import CHOSEN, MOST_ROWS, Tiles, multiply_few
from farspan.kernels.rms_norm.contract import Kind

logger = logging.getLogger(__name__)

_ROUNDS = 20
# Largest relative difference of two correct products of bf16 rows: each rounds once.
_TOLERANCE = 1e-2
# Beside the chosen one, for a single row.
_OTHER_TILES = (Tiles(ahead_bytes=1024), Tiles(outputs=2, inputs=2048), Tiles(outputs=8, num_warps=8))
EARLY, APART = "launched early", "one after another"

Row: TypeAlias = dict[str, Any]
Run: TypeAlias = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What is measured. As many heads of queries as make the width, and as many layers as no cache holds."""

    width: int = 4096
    inner: int = 14336
    groups: int = 8
    dim: int = 128
    layers: int = 32
    rows: tuple[int, ...] = (1, 2, 8, 64)
    linear_rows: tuple[int, ...] = (1, 2, 64)
    summed_bytes: int = 4 * 1024**3
    dtype: torch.dtype = torch.bfloat16

    @property
    def key_width(self) -> int:
        return self.groups * self.dim


@dataclass(frozen=True, slots=True)
class Weights:
    """Of one layer; those over the same rows in one piece."""

    norms_2K: Tensor
    linear: Mapping[str, Tensor]

    @classmethod
    def draw(cls, shape: Shape, device: torch.device) -> Weights:
        width, inner = shape.width, shape.inner
        sizes = {
            "q, k and v": (width + 2 * shape.key_width, width),
            "o": (width, width),
            "gate and up": (2 * inner, width),
            "down": (width, inner),
        }
        linear = {
            name: _draw(*size, dtype=shape.dtype, device=device) * size[1] ** -0.5 for name, size in sizes.items()
        }
        return cls(1 + 0.1 * _draw(2, width, dtype=shape.dtype, device=device), linear)

    @property
    def num_bytes(self) -> int:
        return sum(w.numel() * w.element_size() for w in self.linear.values())

    def bound(self, shape: Shape, early: bool) -> tuple[Chain, Chain]:
        """What is before attention, and what is behind."""
        q, k, v = self.linear["q, k and v"].split([shape.width, shape.key_width, shape.key_width])
        gate, up = self.linear["gate and up"].chunk(2)
        before: list[Step] = [
            Normalize("x", "n", self.norms_2K[0], 1e-5, Kind.SCALED),
            *(Multiply("n", name, w) for name, w in (("q", q), ("k", k), ("v", v))),
            *(Rotate(name, "cos", "sin", f"{name}t", shape.dim) for name in "qk"),
        ]
        after: list[Step] = [
            Multiply("a", "o", self.linear["o"]),
            Add("x", "o", "m"),
            Normalize("m", "mn", self.norms_2K[1], 1e-5, Kind.SCALED),
            Multiply("mn", "gate", gate),
            Multiply("mn", "up", up),
            Gate("gate", "up", "inner", Activation.SILU),
            Multiply("inner", "d", self.linear["down"]),
            Add("m", "d", "y"),
        ]
        given = {"x": shape.width, "cos": shape.dim, "sin": shape.dim}
        return (
            bind_chain_triton(before, given, ["qt", "kt", "v"], shape.dtype, early),
            bind_chain_triton(after, {"a": shape.width, "x": shape.width}, ["y"], shape.dtype, early),
        )


def bench_chain(device: torch.device, shape: Shape = Shape()) -> list[Row]:
    """A row for each contestant: seconds of one layer or product, bytes/s of weights, and their part of a sum's.

    Who gives something else than the others says so in `wrong` and has no time.
    """
    weights = [Weights.draw(shape, device) for _ in range(shape.layers)]
    summed = torch.ones(shape.summed_bytes // 4, device=device)
    rows: list[Row] = []
    for count in shape.rows:
        logger.info("layers on %d rows", count)
        rows += _layers(shape, weights, count, summed)
    for name in weights[0].linear:
        for count in shape.linear_rows:
            logger.info("%s on %d rows", name, count)
            rows += _linear(name, [each.linear[name] for each in weights], count, summed)
    return rows


def _layers(shape: Shape, weights: Sequence[Weights], count: int, summed: Tensor) -> list[Row]:
    angles = 37.0 * torch.arange(count, device=summed.device)[:, None] / torch.arange(1, shape.dim // 2 + 1).to(summed)
    cos_TD, sin_TD = (x.repeat(1, 2).to(shape.dtype) for x in (angles.cos(), angles.sin()))
    x_TK = _draw(count, shape.width, dtype=shape.dtype, device=summed.device)

    def run(chains: Sequence[tuple[Chain, Chain]]) -> Tensor:
        y_TK = x_TK
        for before, after in chains:
            # Rotated queries stand for what attention gives.
            (y_TK,) = after(before(y_TK, cos_TD, sin_TD)[0], y_TK)
        return y_TK

    runs: dict[str, Run] = {
        name: partial(run, [each.bound(shape, early) for each in weights])
        for name, early in ((EARLY, True), (APART, False))
    }
    # The same sums in the same order.
    return _rows(f"layer of {shape.layers}", count, runs, APART, 0.0, weights[0].num_bytes, len(weights), summed)


def _linear(name: str, weights: Sequence[Tensor], count: int, summed: Tensor) -> list[Row]:
    x_TK = _draw(count, weights[0].shape[1], dtype=weights[0].dtype, device=summed.device)
    peer = "torch"

    def run(multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return [multiply(x_TK, w_NK) for w_NK in weights][-1]

    runs: dict[str, Run] = {peer: partial(run, torch.nn.functional.linear)}
    if count <= MOST_ROWS:
        for tiles in (CHOSEN, *(_OTHER_TILES if count == 1 else ())):
            runs[f"farspan {_text(tiles)}"] = partial(run, partial(_few, tiles))
    else:
        runs["by shares, not in use"] = partial(run, multiply_by_shares)
    num_bytes = weights[0].numel() * weights[0].element_size()
    return _rows(name, count, runs, peer, _TOLERANCE, num_bytes, len(weights), summed)


def _few(tiles: Tiles, x_TK: Tensor, w_NK: Tensor) -> Tensor:
    return multiply_few(x_TK, w_NK, None, None, tiles=tiles)


def _text(tiles: Tiles) -> str:
    return f"{tiles.outputs}x{tiles.inputs}, {tiles.num_warps} warps, {tiles.ahead_bytes} ahead"


def _rows(
    what: str,
    count: int,
    runs: Mapping[str, Run],
    peer: str,
    tolerance: float,
    num_bytes: int,
    times: int,
    summed: Tensor,
) -> list[Row]:
    """`num_bytes` are read `times` times by each run."""
    got = {name: run() for name, run in runs.items()}
    want = got[peer].double()
    errors = {name: float((y_TN.double() - want).norm() / want.norm()) for name, y_TN in got.items()}
    device = summed.device
    timed: dict[str, Run] = {**runs, "sum": lambda: summed.sum()}
    seconds = _seconds({name: _captured(run, device) for name, run in timed.items()}, device)
    most = summed.numel() * summed.element_size() / seconds["sum"]
    rows: list[Row] = []
    for name in runs:
        row: Row = {"what": what, "rows": count, "contestant": name}
        # Not above: a NaN is no success.
        if not errors[name] <= tolerance:
            rows.append({**row, "wrong": f"differs by {errors[name]:.2g} from {peer}; allowed {tolerance:.2g}"})
            continue
        speed = num_bytes * times / seconds[name]
        rows.append({**row, "seconds": seconds[name] / times, "bytes_per_second": speed, "of_sum": speed / most})
    return rows


def _captured(run: Run, device: torch.device) -> Callable[[], object]:
    """On a GPU one launch; the interpreter's runs are not captured."""
    if device.type != "cuda":
        return run
    run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _seconds(runs: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """The median of each; the order is turned round in every second round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(_ROUNDS if device.type == "cuda" else 1):
        for name in list(runs) if number % 2 == 0 else reversed(list(runs)):
            times[name].append(_seconds_of(runs[name], device))
    return {name: statistics.median(each) for name, each in times.items()}


def _seconds_of(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    # On the device's own clock: what launching a graph takes is not counted.
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def _draw(*size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(size))
    return torch.randn(size, generator=generator, device=device, dtype=dtype)


def best_tiles(rows: Sequence[Row]) -> dict[str, str]:
    """For each product of one row who is fastest."""
    best: dict[str, Row] = {}
    for row in rows:
        if row["rows"] == 1 and "seconds" in row and row["contestant"] not in (EARLY, APART):
            held = best.setdefault(row["what"], row)
            if row["seconds"] < held["seconds"]:
                best[row["what"]] = row
    return {what: row["contestant"] for what, row in best.items()}


def _speed(row: Row) -> str:
    told = f"{row['seconds'] * 1e6:.1f} us, {row['bytes_per_second'] / 1e12:.2f} TB/s"
    return f"{told}, {row['of_sum']:.3f} of a sum"


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit(
            "this bench measures a GPU and torch sees none: run it where torch.cuda.is_available() is true"
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    rows = bench_chain(torch.device("cuda"))
    sys.stdout.write(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    for row in rows:
        told = f"wrong, {row['wrong']}" if "wrong" in row else _speed(row)
        sys.stdout.write(f"  {row['what']}, {row['rows']} rows, {row['contestant']}: {told}\n")
    for what, contestant in best_tiles(rows).items():
        sys.stdout.write(f"  fastest for {what} on one row: {contestant}\n")
    if any("wrong" in row for row in rows):
        raise SystemExit("some results are wrong: nothing is faster than right")


if __name__ == "__main__":
    main()
