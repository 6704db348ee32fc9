"""`farspan bench`: measure this machine against the best peer on the same work."""

from __future__ import annotations

import json
import logging
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from farspan.config.load import nearest
from farspan.errors import ConfigError, FarspanError

BASELINES = Path("benchmarks") / "baselines"


def run_bench(
    what: str,
    *,
    as_json: bool,
    save: bool = False,
    minutes: float | None = None,
    width: int | None = None,
    layers: int | None = None,
    vllm_env: str | None = None,
    peers: str = "generate,batching",
    turns: int = 3,
    long_tokens: int | None = None,
) -> None:
    """Run one bench, or all but `train`, which takes twenty minutes, `serve` and `roles`; `show_results` of its rows.

    `minutes`, `width` and `layers` are those of `train`; `vllm_env`, `peers` and `turns` those of `engine`;
    `long_tokens` that of `serve`.
    """
    import torch

    from farspan.kernels.attention.bench import bench_attention
    from farspan.kernels.paged_decode.bench import bench_paged_decode
    from farspan.kernels.sampling.bench import bench_sampling
    from farspan.memory.bench import bench_memory
    from farspan.parallel.bench import bench_parallel
    from farspan.serve.bench_transfer import bench_transfer
    from farspan.train.long_context import bench_long_context
    from farspan.train.long_context_gpu import bench_one_gpu

    benches: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "attention": bench_attention,
        "paged-decode": bench_paged_decode,
        "sampling": bench_sampling,
        "engine": lambda: _bench_engine(vllm_env, peers, turns),
        "memory": bench_memory,
        "parallel": bench_parallel,
        "transfer": bench_transfer,
        "long-context": bench_one_gpu if torch.cuda.is_available() else bench_long_context,
    }
    if what == "train":
        from farspan.jobs.bench_train import bench_train, sized

        benches = {what: lambda: bench_train(sized(width, layers, minutes))}
    if what == "serve":
        benches = {what: lambda: _bench_serve(long_tokens)}
    if what == "roles":
        benches = {what: _bench_roles}
    if what != "all" and what not in benches:
        known = [*benches, "serve", "roles", "train"]
        raise ConfigError("bench", f"must be all or one of {', '.join(known)}", what, nearest(what, known))
    if save and not BASELINES.parent.is_dir():
        raise ConfigError("--save", "must be used in farspan's own repository", str(Path.cwd()), "change to its root")
    with shown_progress():
        results = {name: bench() for name, bench in benches.items() if what in ("all", name)}
    show_results(results, as_json, save)


def _bench_engine(vllm_env: str | None, peers: str, turns: int) -> list[dict[str, Any]]:
    from farspan.engine.bench import EngineBench, bench_engine
    from farspan.engine.bench_contenders import BATCHED, GENERATE

    known, wanted = {"generate": GENERATE, "batching": BATCHED}, [name for name in peers.split(",") if name != "none"]
    for name in wanted:
        if name not in known:
            raise ConfigError("--peers", "must be generate, batching, both, or none", name, nearest(name, list(known)))
    if turns < 1:
        raise ConfigError("--turns", "must be at least 1", turns, "use --turns 3")
    import torch

    peers_wanted = tuple(known[name] for name in wanted)
    # vLLM is asked as another process, about a checkpoint on disk.
    if torch.cuda.is_available() and vllm_env is None:
        from farspan.engine.bench_gpu import GpuBench, bench_gpu

        return bench_gpu(GpuBench(turns=turns, peers=peers_wanted))
    python = None if vllm_env is None else str(Path(vllm_env) / "bin" / "python")
    return bench_engine(EngineBench(vllm_python=python, turns=turns, peers=peers_wanted))


def _bench_serve(long_tokens: int | None) -> list[dict[str, Any]]:
    from farspan.jobs.launch import local_ray
    from farspan.serve.bench import ServeBench, bench_serve

    if long_tokens is not None and long_tokens < 1:
        raise ConfigError("--long-tokens", "must be at least 1", long_tokens, "use --long-tokens 16384")
    bench = ServeBench() if long_tokens is None else ServeBench(long_tokens=long_tokens)
    with local_ray(2):
        return bench_serve(bench)


def _bench_roles() -> list[dict[str, Any]]:
    from farspan.jobs.launch import local_ray
    from farspan.serve.bench_roles import bench_roles

    with local_ray(2):
        return bench_roles()


@contextmanager
def shown_progress() -> Iterator[None]:
    """Inside, what the benches say of their way goes to stderr, line by line."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    progress = logging.getLogger("farspan")
    level = progress.level
    progress.addHandler(handler)
    progress.setLevel(logging.INFO)
    try:
        yield
    finally:
        progress.removeHandler(handler)
        progress.setLevel(level)


def show_results(results: dict[str, list[dict[str, Any]]], as_json: bool, save: bool) -> None:
    """Print the rows; `save` also writes benchmarks/baselines/<bench>-<machine>.json.

    Raises FarspanError after printing when results were wrong: a wrong answer has no speed, and no baseline.
    """
    if as_json:
        typer.echo(json.dumps(results))
    else:
        for name, rows in results.items():
            typer.echo(name)
            for row in rows:
                typer.echo("  " + "  ".join(f"{key} {_text(value)}" for key, value in row.items()))
    if wrong := [row["wrong"] for rows in results.values() for row in rows if "wrong" in row]:
        raise FarspanError(f"{len(wrong)} rows of the bench are wrong ({wrong[0]}); nothing is faster than right")
    if save:
        for name, rows in results.items():
            _save(name, rows)


def machine() -> dict[str, Any]:
    """What a measurement was made on, without the name of the host."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    """The processor's model and instruction width, as the kernel of the operating system knows them."""
    import torch

    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return f"{model[1].strip() if model else platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _save(name: str, rows: list[dict[str, Any]]) -> None:
    BASELINES.mkdir(exist_ok=True)
    here = machine()
    label = re.sub(r"[^a-z0-9]+", "-", f"{here['device']} {here['threads']} threads".lower()).strip("-")
    path = BASELINES / f"{name}-{label}.json"
    path.write_text(json.dumps({"machine": here, "rows": rows}, indent=1) + "\n")
    typer.echo(f"saved {path}", err=True)


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
