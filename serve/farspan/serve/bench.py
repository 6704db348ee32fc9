"""What serving costs beside the bare engine, and what it is for: `farspan bench serve`.

The engine answers in a process of its own, the endpoint over HTTP; they take turns over the same checkpoint, so that a
machine whose speed drifts drifts for both. Prompts are new in every turn.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from farspan.config.schema import EngineConfig, RoleConfig, ServeConfig, TransferConfig
from farspan.config.serve_rules import LISTENERS
from farspan.engine.bench import EngineBench, Work, contender, write_checkpoint
from farspan.engine.bench_contenders import FARSPAN
from farspan.errors import ClusterError
from farspan.serve.app import run_app
from farspan.serve.bench_client import BenchClient, Streamed
from farspan.serve.port import free_port

logger = logging.getLogger(__name__)

GOAL_OF_ENGINE, GOAL_PREFIX = 0.9, 0.2
# Prompts of the two ways are never the same: nobody finds the other's, and no turn an earlier one's.
_SEEDS_OF_HTTP = 1_000_000


@dataclass(frozen=True, kw_only=True)
class ServeBench:
    """What is measured. The defaults are the checkpoint of `farspan bench engine`, with room for longer prompts."""

    engine: EngineBench = field(default_factory=lambda: _longer(EngineBench()))
    work: Work = field(default_factory=lambda: Work("16 x (512 in + 128 out)", 16, 512, 128))
    running: int = 4
    """Streams whose gaps are measured while long prompts arrive."""
    long_tokens: int = 16384
    num_long: int = 1
    shared_tokens: int = 4096
    start_timeout_s: float = 300.0


def _longer(bench: EngineBench) -> EngineBench:
    # More turns: what other processes on the machine take is not the same from one to the next.
    return replace(bench, settings={**bench.settings, "max_position_embeddings": 65536}, deadline_s=600.0, turns=9)


def bench_serve(bench: ServeBench | None = None) -> list[dict[str, Any]]:
    """Rows of throughput, of interference and of a shared prefix, on the Ray this process is connected to.

    Raises ClusterError when an answer is missing or not as long as asked.
    """
    bench = bench or ServeBench()
    with tempfile.TemporaryDirectory(prefix="farspan-bench-") as scratch:
        folder = Path(scratch) / "model"
        num_weights, _ = write_checkpoint(bench.engine, folder)
        write_tokenizer(folder, bench.engine.settings["vocab_size"])
        log, rows = Path(scratch) / "engine.log", []
        with _served(bench, folder) as client:
            rows += _throughput(bench, folder, log, client)
            rows += _prefix(bench, client)
            colocated = asyncio.run(_interference(bench, client))
        with _served(bench, folder, listener="ingress") as client:
            rows += _throughput(bench, folder, log, client, listener="ingress")
        with _served(bench, folder, split=True) as client:
            split = asyncio.run(_interference(bench, client))
        if bench.engine.threads > 1:
            # An engine on every core leaves none for an endpoint. One that spares a core is slower, by both ways.
            few = max(1, bench.engine.turns - 1)
            sparing = replace(bench, engine=replace(bench.engine, threads=bench.engine.threads - 1, turns=few))
            for listener in LISTENERS:
                with _served(sparing, folder, listener=listener) as client:
                    rows += _throughput(sparing, folder, log, client, listener=listener)
    rows += interference_rows(bench, colocated, split)
    return [{**row, "weights": num_weights} for row in rows]


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer of `vocab_size` different texts: prompts are tokens here, answers are text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"w{number}" for number in range(vocab_size - len(letters))]
    bpe = Tokenizer(models.BPE(vocab={text: token for token, text in enumerate([*letters, *words])}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(folder)


@contextmanager
def _served(bench: ServeBench, folder: Path, *, split: bool = False, listener: str = "proxy") -> Iterator[BenchClient]:
    """A running endpoint: one worker for prompts and one for answers, or one for both beside an idle one."""
    longest = bench.engine.settings["max_position_embeddings"]
    logger.info("starting an endpoint, %s, listener=%s", "disaggregated" if split else "colocated", listener)
    config = ServeConfig(
        model=str(folder),
        port=free_port(),
        listener=listener,
        prefill=RoleConfig(cpus=0.1),
        decode=RoleConfig(cpus=0.1),
        engine=EngineConfig(
            dtype=bench.engine.dtype,
            kv_bytes=bench.engine.kv_bytes,
            # Both ways have the same threads where only one of two workers is busy.
            threads=bench.engine.threads if not split else max(1, bench.engine.threads // 2),
        ),
        transfer=TransferConfig(split="always", colocate_below_tokens=0 if split else longest),
        start_timeout_s=bench.start_timeout_s,
    )
    with run_app(config) as running:
        key = Path(running.api_key_file).read_text().split()[0]
        yield BenchClient(running.url, running.model, key, bench.engine.deadline_s)


def _throughput(
    bench: ServeBench, folder: Path, log: Path, client: BenchClient, *, listener: str = "proxy"
) -> list[dict[str, Any]]:
    """An engine of its own beside each endpoint: it has seen none of the prompts."""
    with contender(FARSPAN, folder, bench.engine, log) as engine:
        return _turns(bench, engine.ask, client, listener)


def _turns(bench: ServeBench, ask: Any, client: BenchClient, listener: str) -> list[dict[str, Any]]:
    work, vocab_size = bench.work, bench.engine.settings["vocab_size"]
    bare, through = [], []
    for turn in range(1 + bench.engine.turns):
        prompts, others = (work.prompts(vocab_size, seed + turn) for seed in (0, _SEEDS_OF_HTTP))
        contenders = {
            "engine": lambda prompts=prompts: ask(prompts, work.new_tokens, bench.engine.deadline_s)[0],
            "HTTP": lambda prompts=others: _seconds_of_all(client, prompts, work.new_tokens),
        }
        # Each begins every other turn: a machine that gets slower is not always slower for the same one.
        took_s = {name: contenders[name]() for name in sorted(contenders, reverse=turn % 2 == 0)}
        logger.info("%s: engine %.2f s, HTTP (%s) %.2f s", work.name, took_s["engine"], listener, took_s["HTTP"])
        # The first turn of each compiles, and fills caches.
        if turn:
            bare.append(took_s["engine"])
            through.append(took_s["HTTP"])
    return throughput_rows(work, bench.engine.threads, listener, bare, through)


def throughput_rows(
    work: Work, threads: int, listener: str, bare: Sequence[float], through: Sequence[float]
) -> list[dict[str, Any]]:
    """Seconds of each turn by both ways, as rows; `threads`: of the engine."""
    num_tokens = work.count * work.new_tokens
    part = statistics.median(a / b for a, b in zip(bare, through, strict=True))
    same: dict[str, Any] = {"work": work.name, "threads": threads, "listener": listener}
    return [
        {**same, "through": "engine", "new_tokens_per_s": num_tokens / statistics.median(bare)},
        {
            **same,
            "through": "HTTP streams",
            "new_tokens_per_s": num_tokens / statistics.median(through),
            "part of the engine": part,
            "goal": GOAL_OF_ENGINE,
        },
    ]


def _seconds_of_all(client: BenchClient, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
    began = time.perf_counter()
    asyncio.run(_all(client, prompts, new_tokens))
    return time.perf_counter() - began


async def _all(client: BenchClient, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Streamed]:
    return list(await asyncio.gather(*(client.stream(prompt, new_tokens) for prompt in prompts)))


def _prefix(bench: ServeBench, client: BenchClient) -> list[dict[str, Any]]:
    """How soon the second of two prompts that begin alike is answered."""
    parts, work = [], Work("prefix", 2, 16, 2, shared=bench.shared_tokens)
    for turn in range(bench.engine.turns):
        prompts = work.prompts(bench.engine.settings["vocab_size"], 2 * _SEEDS_OF_HTTP + turn)
        first, second = (asyncio.run(client.stream(prompt, work.new_tokens)) for prompt in prompts)
        parts.append((first.first_s, second.first_s, second.cached_tokens))
        logger.info("first token after %.3f s, with %d tokens shared after %.3f s", *parts[-1][:1], *parts[-1][:0:-1])
    return [
        {
            "work": f"prefix of {bench.shared_tokens} tokens",
            "first_s": statistics.median(part[0] for part in parts),
            "second_s": statistics.median(part[1] for part in parts),
            "found_tokens": min(part[2] for part in parts),
            "second / first": statistics.median(part[1] / part[0] for part in parts),
            "goal": GOAL_PREFIX,
        }
    ]


@dataclass(frozen=True, slots=True)
class Gaps:
    """Between events of running streams."""

    alone_s: list[float]
    meanwhile_s: list[float]
    """While long prompts arrive."""


async def _interference(bench: ServeBench, client: BenchClient) -> Gaps:
    vocab_size, seed = bench.engine.settings["vocab_size"], 3 * _SEEDS_OF_HTTP
    room = bench.engine.settings["max_position_embeddings"] // 2
    longs = Work("long", bench.num_long, bench.long_tokens, 1).prompts(vocab_size, seed)
    shorts = Work("short", bench.running, 32, 1).prompts(vocab_size, seed + 1)
    watched = [_Watched(client, prompt, room) for prompt in shorts]
    try:
        async with asyncio.timeout(bench.engine.deadline_s):
            await asyncio.gather(*(one.has(1) for one in watched))
            began = time.perf_counter()
            await asyncio.gather(*(one.has(bench.work.new_tokens // 2) for one in watched))
        arriving = time.perf_counter()
        for prompt in longs:
            await client.stream(prompt, 1)
        over = time.perf_counter()
        logger.info("%d prompts of %d tokens in %.1f s", len(longs), bench.long_tokens, over - arriving)
    except TimeoutError:
        raise ClusterError(f"the streams did not get on within {bench.engine.deadline_s:g} s") from None
    finally:
        await asyncio.gather(*(one.stop() for one in watched))
    return Gaps(
        [gap for one in watched for gap in one.streamed.gaps_s(began, arriving)],
        [gap for one in watched for gap in one.streamed.gaps_s(arriving, over)],
    )


class _Watched:
    """A long answer that is looked at while it comes, and given up in the end."""

    def __init__(self, client: BenchClient, prompt: Sequence[int], new_tokens: int) -> None:
        self.streamed = Streamed(time.perf_counter())
        self._task = asyncio.ensure_future(client.watch(prompt, new_tokens, self.streamed))

    async def has(self, count: int) -> None:
        """Wait until so many events came. Raises ClusterError when it ends before."""
        while len(self.streamed.at_s) < count:
            if self._task.done():
                raise ClusterError(f"a stream broke off: {self._task.exception() or 'it is shorter than asked for'}")
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def interference_rows(bench: ServeBench, colocated: Gaps, split: Gaps) -> list[dict[str, Any]]:
    work = f"{bench.running} streams while {bench.num_long} x {bench.long_tokens} tokens arrive"
    rows: list[dict[str, Any]] = []
    for workers, gaps in (("colocated", colocated), ("disaggregated", split)):
        row = {"work": work, "workers": workers, "p99_alone_s": p99(gaps.alone_s), "p99_s": p99(gaps.meanwhile_s)}
        if workers == "disaggregated":
            row["p99 of colocated / disaggregated"] = p99(colocated.meanwhile_s) / p99(split.meanwhile_s)
        rows.append(row)
    return rows


def p99(values: Sequence[float]) -> float:
    """The value that 99 of 100 do not exceed."""
    return sorted(values)[max(0, -(-len(values) * 99 // 100) - 1)]
