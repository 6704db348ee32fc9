"""Where the time of a decode step goes: kernels of the device by name, beside the time that a step takes.

python -m farspan.engine.bench_profile            the 8B-shaped Llama of `farspan bench engine`, on CUDA
python -m farspan.engine.bench_profile --tiny     a small one; without a GPU, operators of the CPU instead
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.profiler import ProfilerActivity, profile

from farspan.config.schema import EngineConfig
from farspan.engine.bench import Work
from farspan.engine.bench_gpu import GpuBench, device_model
from farspan.engine.engine import Engine
from farspan.engine.request import SamplingParams

_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
}
_WARM_STEPS, _SHOWN = 16, 30


@dataclass(frozen=True, slots=True)
class Kernel:
    """What one name took in a step."""

    name: str
    count: float
    busy_ms: float


@dataclass(frozen=True, slots=True)
class StepProfile:
    """A decode step of so many rows, the mean of several."""

    rows: int
    wall_ms: float
    """Without a profiler beside it."""
    profiled_ms: float
    kernels: tuple[Kernel, ...]
    """The longest first."""

    @property
    def busy_ms(self) -> float:
        return sum(kernel.busy_ms for kernel in self.kernels)

    def table(self) -> Iterator[str]:
        yield f"decode step of {self.rows} rows: {self.wall_ms:.3f} ms ({self.profiled_ms:.3f} ms while profiled)"
        count = sum(kernel.count for kernel in self.kernels)
        yield f"{self.busy_ms:9.3f} ms busy  {count:8.1f} launches  {len(self.kernels)} names"
        for kernel in self.kernels[:_SHOWN]:
            yield f"{kernel.busy_ms:9.3f} ms       {kernel.count:8.1f} x         {kernel.name[:90]}"


def profile_decode(bench: GpuBench, steps: int = 5) -> Iterator[StepProfile]:
    """One profile for each number of rows of `bench`, while its context grows by some tokens."""
    most = bench.context_tokens + _WARM_STEPS + 3 * steps + 40
    config = EngineConfig(
        dtype=bench.dtype,
        kv_bytes=bench.kv_bytes,
        max_batch_tokens=bench.prefill_tokens,
        max_sequences=max(bench.rows),
        max_context_tokens=most,
    )
    engine = Engine(device_model(bench), config)
    for rows in bench.rows:
        prompts = Work("profile", rows, bench.context_tokens, 1).prompts(int(bench.shape["vocab_size"]), rows)
        for number, prompt in enumerate(prompts):
            engine.add(f"{rows}/{number}", prompt, SamplingParams(max_tokens=most - len(prompt), ignore_eos=True))
        # Until everybody decodes, and everything is compiled.
        while len(engine.step()) < rows:
            pass
        _step_s(engine, _WARM_STEPS)
        wall_s = _step_s(engine, 2 * steps)
        yield _profiled(engine, rows, steps, wall_s, cuda=bench.device.startswith("cuda"))
        for number in range(rows):
            engine.cancel(f"{rows}/{number}")
    engine.close()


def _profiled(engine: Engine, rows: int, steps: int, wall_s: float, *, cuda: bool) -> StepProfile:
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        profiled_s = _step_s(engine, steps)
    kernels = []
    for event in found.key_averages():
        busy_us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if busy_us > 0:
            kernels.append(Kernel(event.key, event.count / steps, busy_us / 1e3 / steps))
    kernels.sort(key=lambda kernel: -kernel.busy_ms)
    return StepProfile(rows, 1e3 * wall_s, 1e3 * profiled_s, tuple(kernels))


def _step_s(engine: Engine, steps: int) -> float:
    """Seconds of a step, the mean of some."""
    if engine.pool.device.type == "cuda":
        torch.cuda.synchronize(engine.pool.device)
    began = time.perf_counter()
    for _ in range(steps):
        engine.step()
    if engine.pool.device.type == "cuda":
        torch.cuda.synchronize(engine.pool.device)
    return (time.perf_counter() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64], help="sequences side by side")
    parser.add_argument("--steps", type=int, default=5, help="steps that are profiled")
    asked = parser.parse_args()
    bench = replace(GpuBench(), rows=tuple(asked.rows))
    if asked.tiny:
        bench = replace(bench, shape=_TINY, context_tokens=64, kv_bytes=64 << 20)
    if not torch.cuda.is_available():
        bench = replace(bench, device="cpu", dtype="float32")
    for found in profile_decode(bench, asked.steps):
        print("\n".join(found.table()), flush=True)


if __name__ == "__main__":
    main()
