"""The engine on one GPU beside transformers, on an 8B-shaped Llama: `farspan bench engine` where there is a GPU.

The bound of decode is memory: the weights a step reads, and the keys and values of its rows, over the bandwidth that
this device reads with; that of prefill is the arithmetic of the model, at the speed of a large matrix product. Both are
measured in the same run. A step's time is the difference between long answers and answers of one token, divided by the
tokens between. Weights are random and made on the device. Contenders run one after the other, farspan first; its tokens
are held against transformers' own logits before anything is timed.
"""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from farspan.config.schema import EngineConfig
from farspan.engine.bench import Work, how_far_below
from farspan.engine.bench_contenders import BATCHED, FARSPAN, GENERATE, Answer, by_batching, by_engine, by_generate
from farspan.engine.engine import Engine
from farspan.engine.runner import Runner
from farspan.models.checkpoint import make_config

logger = logging.getLogger(__name__)

GOAL_DECODE, GOAL_PREFILL = 0.85, 0.6
# How far below the best logit, in standard deviations of a row, a token of bf16 may be. The judge is bf16 too, and of
# hundreds of tokens the worst counts (0.17 on an H200); a row that reads another's pages is several deviations off.
_MOST_BELOW = 0.3
_CHECK_TOKENS, _CHECK_ANSWER = 48, 6
_LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 16384,
}
# Of transformers' batching, as it likes them; ours are those of the engine's defaults.
_PEER_PAGE_TOKENS = 256

Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class GpuBench:
    """What is measured."""

    shape: Mapping[str, Any] = field(default_factory=lambda: dict(_LLAMA_8B))
    dtype: str = "bfloat16"
    device: str = "cuda"
    rows: tuple[int, ...] = (1, 64)
    context_tokens: int = 512
    steps: int = 96
    """Tokens of a long answer after its first."""
    prefill_tokens: int = 8192
    turns: int = 3
    peer_turns: int = 2
    kv_bytes: int = 8 << 30
    peers: tuple[str, ...] = (GENERATE, BATCHED)
    bandwidth_bytes: int = 4 << 30
    peak_width: int = 8192
    deadline_s: float = 130.0
    """After so long nobody is asked any more; what was not measured says so."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the device can do."""

    bytes_per_s: float
    read_by: str
    flops_per_s: float


def bench_gpu(bench: GpuBench | None = None, tell: Callable[[Row], None] | None = None) -> list[Row]:
    """One row per work and contender, with its part of the bound; farspan's also say the goal.

    `tell` gets each row as soon as it is known. A contender whose answers are not the model's has `wrong` in its row.
    """
    bench = bench or GpuBench()
    return _Comparison(bench, tell or _log).rows()


def print_row(row: Row) -> None:
    """Show a row at once."""
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def _log(row: Row) -> None:
    logger.info("%s", row)


class _Comparison:
    def __init__(self, bench: GpuBench, tell: Callable[[Row], None]) -> None:
        self._bench, self._tell = bench, tell
        self._device = torch.device(bench.device)
        self._end = time.monotonic() + bench.deadline_s
        self._rows: list[Row] = []
        self._our_seconds: dict[str, float] = {}
        self._vocab_size = int(bench.shape["vocab_size"])

    def rows(self) -> list[Row]:
        bench = self._bench
        machine = measure_machine(bench, self._device)
        self._say({"bytes_per_s": machine.bytes_per_s, "read by": machine.read_by, "flops_per_s": machine.flops_per_s})
        plain = device_model(bench)
        self._ours(plain, machine)
        # Its weights and pages are not beside those of the others.
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        for name in bench.peers:
            try:
                self._measure(name, self._peer(name, plain), machine, plain)
            # A peer that cannot run on this machine: whatever it raises is its row.
            except Exception as problem:
                reason = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
                self._say({"contender": name, "not_measured": reason})
            finally:
                if name == BATCHED:
                    plain.destroy_cached_continuous_batching_manager()
        return self._rows

    def _ours(self, plain: PreTrainedModel, machine: Machine) -> None:
        """farspan on another model with the same weights."""
        bench = self._bench
        config = EngineConfig(
            dtype=bench.dtype,
            kv_bytes=bench.kv_bytes,
            max_batch_tokens=bench.prefill_tokens,
            max_sequences=max(bench.rows),
            max_context_tokens=max(bench.prefill_tokens + 1, bench.context_tokens + bench.steps + 1),
        )
        began = time.perf_counter()
        engine = Engine(device_model(bench), config)
        runner = engine._runner
        graphs = runner.graphs if isinstance(runner, Runner) else []
        self._say({"contender": FARSPAN, "start_s": time.perf_counter() - began, "path": engine.path, "graphs": graphs})
        answer = by_engine(engine)
        if wrong := self._wrong(answer, plain):
            self._say({"contender": FARSPAN, "wrong": wrong})
        else:
            self._measure(FARSPAN, answer, machine, plain)
        engine.close()

    def _peer(self, name: str, plain: PreTrainedModel) -> Answer:
        if name == GENERATE:
            return by_generate(plain)
        return by_batching(plain, self._bench.kv_bytes, _PEER_PAGE_TOKENS)

    def _wrong(self, answer: Answer, plain: PreTrainedModel) -> str | None:
        """Whether tokens of one row and of many are not the model's."""
        below = 0.0
        for rows in self._bench.rows:
            prompts = Work("check", rows, _CHECK_TOKENS, _CHECK_ANSWER).prompts(self._vocab_size, 99 + rows)
            answers = answer(prompts, _CHECK_ANSWER)
            found = [how_far_below(plain, p, a) for p, a in zip(prompts, answers, strict=True)]
            # Written so that NaN is wrong too.
            if not all(each <= _MOST_BELOW for each in found):
                return f"of {rows} rows, a token is {max(found):.2g} deviations below the best; allowed {_MOST_BELOW}"
            below = max(below, *found)
        self._say({"contender": FARSPAN, "most deviations below the best": below})
        return None

    def _measure(self, name: str, answer: Answer, machine: Machine, plain: PreTrainedModel) -> None:
        bench = self._bench
        for rows in bench.rows:
            work = f"decode, {rows} x {bench.context_tokens} tokens"
            short = Work(work, rows, bench.context_tokens, 1)
            long = Work(work, rows, bench.context_tokens, 1 + bench.steps)
            pairs = self._seconds(name, answer, (short, long))
            if pairs is None:
                self._say({"work": work, "contender": name, "not_measured": "no time was left"})
                continue
            step_s = statistics.median(long_s - short_s for short_s, long_s in pairs) / bench.steps
            bound_s = step_bytes(plain, rows, bench.context_tokens + 1 + bench.steps / 2) / machine.bytes_per_s
            row = {"step_ms": 1e3 * step_s, "new_tokens_per_s": rows / step_s, "part of the bound": bound_s / step_s}
            self._row(work, name, step_s, row, GOAL_DECODE)
        work = f"prefill, {bench.prefill_tokens} tokens"
        found = self._seconds(name, answer, (Work(work, 1, bench.prefill_tokens, 1),))
        if found is None:
            self._say({"work": work, "contender": name, "not_measured": "no time was left"})
            return
        seconds = statistics.median(times[0] for times in found)
        part = prefill_flops(plain, bench.prefill_tokens) / seconds / machine.flops_per_s
        row = {"seconds": seconds, "tokens_per_s": bench.prefill_tokens / seconds, "part of the peak": part}
        self._row(work, name, seconds, row, GOAL_PREFILL)

    def _seconds(self, name: str, answer: Answer, works: tuple[Work, ...]) -> list[tuple[float, ...]] | None:
        """Of each turn but the first, which compiles and captures, the seconds of each work; none: it is too late."""
        found: list[tuple[float, ...]] = []
        for turn in range(1 + (self._bench.turns if name == FARSPAN else self._bench.peer_turns)):
            times: list[float] = []
            for number, work in enumerate(works):
                if time.monotonic() > self._end:
                    # Fewer turns are turns too.
                    return found[1:] or None
                prompts = work.prompts(self._vocab_size, 1000 * work.count + 10 * turn + number)
                began = time.perf_counter()
                answers = answer(prompts, work.new_tokens)
                times.append(time.perf_counter() - began)
                lengths = [len(tokens) for tokens in answers]
                assert lengths == [work.new_tokens] * work.count, f"{name} answered {lengths[:4]}"
            found.append(tuple(times))
        return found[1:]

    def _row(self, work: str, name: str, seconds: float, measured: Row, goal: float) -> None:
        row = {"work": work, "contender": name, **measured}
        if name == FARSPAN:
            self._our_seconds[work] = seconds
            row["goal"] = goal
        elif work in self._our_seconds:
            row["speed of farspan / peer"] = seconds / self._our_seconds[work]
        self._say(row)

    def _say(self, row: Row) -> None:
        self._rows.append(row)
        self._tell(row)


def device_model(bench: GpuBench) -> PreTrainedModel:
    """A random Llama, the same every time on this device. No token ends an answer."""
    fixed = {"tie_word_embeddings": False, "dtype": bench.dtype, "eos_token_id": None, "bos_token_id": None}
    config = make_config("llama", {**bench.shape, **fixed}, {})
    device = torch.device(bench.device)
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, bench.dtype))
    return model.eval()


def step_bytes(model: PreTrainedModel, rows: int, tokens: float) -> float:
    """What a decode step of `rows` sequences of `tokens` tokens must read: weights once, keys and values of each."""
    text = model.config
    # Of the embedding, a row for each token.
    table = model.get_input_embeddings().weight
    weights = sum(p.numel() for p in model.parameters()) - table.numel() + rows * table.shape[1]
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    return float((weights + rows * tokens * per_token) * model.dtype.itemsize)


def prefill_flops(model: PreTrainedModel, tokens: int) -> float:
    """Multiplications and additions of the model's products: of its layers for every token, of its head for one."""
    text = model.config
    head = model.get_output_embeddings().weight.numel()
    layers = sum(p.numel() for p in model.parameters()) - head - model.get_input_embeddings().weight.numel()
    # Half of the pairs of tokens, twice: scores and sums.
    attention = 2 * tokens**2 * text.num_attention_heads * text.head_dim * text.num_hidden_layers
    return float(2 * layers * tokens + attention + 2 * head)


def measure_machine(bench: GpuBench, device: torch.device) -> Machine:
    """Bandwidth of reading, by whichever of a sum and a copy is faster, and speed of a large product."""
    speeds = _bandwidths(bench.bandwidth_bytes, device)
    best = max(speeds, key=lambda name: speeds[name])
    return Machine(speeds[best], best, _product_speed(bench.peak_width, getattr(torch, bench.dtype), device))


def _bandwidths(num_bytes: int, device: torch.device) -> dict[str, float]:
    big = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    from_here, to_there = big.chunk(2)
    # A copy reads half of the bytes and writes the other.
    ways = {"a sum": lambda: big.sum(), "a copy": lambda: to_there.copy_(from_here)}
    return {name: big.nbytes / _best_s(run, device) for name, run in ways.items()}


def _product_speed(width: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b, out = (torch.randn(width, width, device=device).to(dtype) for _ in range(3))
    return 2 * width**3 / _best_s(lambda: torch.mm(a, b, out=out), device)


def _best_s(run: Callable[[], object], device: torch.device) -> float:
    """The shortest of some calls in a row."""
    for _ in range(3):
        run()
    return min(_timed(run, device) for _ in range(10))


def _timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
