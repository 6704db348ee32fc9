"""Roles that follow the load beside fixed ones, while the load turns round: `farspan bench roles`.

Nine of ten requests have long prompts and short answers, then nine of ten are the other way round. One endpoint has
fixed roles: a worker for prompts, a worker for answers. The other's workers take the roles that the load asks for. Both
are asked the same at the same times, as much as keeps two workers busy and one not enough. The model computes in
float64, so that every answer of one can be held against the other's: a wrong answer has no goodput.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from farspan.config.schema import EngineConfig, ObjectivesConfig, RoleConfig, ServeConfig, TransferConfig
from farspan.models.checkpoint import make_config, random_causal_lm
from farspan.serve.app import handle_for_threads, run_app
from farspan.serve.bench import write_tokenizer
from farspan.serve.bench_client import BenchClient
from farspan.serve.bench_flip import Driven, Flip, Pace, Standing, Watched, drive, flipping, measure, role_rows
from farspan.serve.load import WorkerLoad
from farspan.serve.port import free_port

logger = logging.getLogger(__name__)

_REPORT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class RolesBench:
    """What is measured. The defaults are a Llama of a million weights: the roles matter here, not the model."""

    settings: dict[str, Any] = field(
        default_factory=lambda: {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 2048,
            "max_position_embeddings": 4096,
            # Small weights give one token over and over, whatever was computed before.
            "initializer_range": 0.2,
        }
    )
    flip: Flip = field(default_factory=Flip)
    threads: int = field(default_factory=lambda: max(1, torch.get_num_threads() // 2))
    """Of each of the two workers."""
    max_batch_tokens: int = 512
    max_sequences: int = 32
    kv_bytes: int = 256 << 20
    start_timeout_s: float = 300.0
    deadline_s: float = 300.0
    """Longest time for one answer."""


def bench_roles(bench: RolesBench | None = None) -> list[dict[str, Any]]:
    """A row of fixed roles and one of roles that follow, on the Ray this process is connected to.

    Raises ClusterError when an endpoint does not start, or does not answer what its speed is measured by.
    """
    bench = bench or RolesBench()
    with tempfile.TemporaryDirectory(prefix="farspan-bench-") as scratch:
        folder = Path(scratch) / "model"
        write_model(bench.settings, folder)
        with _served(bench, folder, None) as client:
            pace, fixed = asyncio.run(_first(bench, client))
        with _served(bench, folder, pace) as client:
            following = asyncio.run(_second(bench, client, pace))
    return role_rows(bench.flip, pace, fixed, following)


def write_model(settings: dict[str, Any], folder: Path) -> None:
    """A random Llama in float64 that no token ends, and a tokenizer."""
    ends = {"tie_word_embeddings": True, "dtype": "float64", "eos_token_id": None, "bos_token_id": None}
    random_causal_lm(make_config("llama", {**settings, **ends}, {}), 0).double().save_pretrained(folder)
    write_tokenizer(folder, settings["vocab_size"])


async def _first(bench: RolesBench, client: BenchClient) -> tuple[Pace, Driven]:
    """Fixed roles, and what they are fast: a worker for prompts and one for answers are measured by themselves."""
    vocab_size = bench.settings["vocab_size"]
    pace = await measure(bench.flip, client, vocab_size)
    logger.info("a long prompt takes %.3f s of a worker, a long answer %.3f s", pace.prompt_s, pace.answer_s)
    async with _watching() as watched:
        return pace, await drive(client, flipping(bench.flip, pace, vocab_size), watched)


async def _second(bench: RolesBench, client: BenchClient, pace: Pace) -> Driven:
    vocab_size = bench.settings["vocab_size"]
    # What compiles, compiles now, as it did for the other.
    await measure(bench.flip, client, vocab_size)
    async with _watching() as watched:
        return await drive(client, flipping(bench.flip, pace, vocab_size), watched)


@contextmanager
def _served(bench: RolesBench, folder: Path, pace: Pace | None) -> Iterator[BenchClient]:
    """A running endpoint of two workers; without a pace their roles are fixed."""
    logger.info("starting an endpoint whose roles %s", "are fixed" if pace is None else "follow the load")
    aims = ObjectivesConfig() if pace is None else ObjectivesConfig(first_token_s=pace.first_s, token_s=pace.token_s)
    config = ServeConfig(
        model=str(folder),
        port=free_port(),
        prefill=RoleConfig(cpus=0.1),
        decode=RoleConfig(cpus=0.1),
        engine=EngineConfig(
            dtype="float64",
            kv_bytes=bench.kv_bytes,
            threads=bench.threads,
            max_batch_tokens=bench.max_batch_tokens,
            max_sequences=bench.max_sequences,
        ),
        transfer=TransferConfig(split="always" if pace is None else "predicted"),
        objectives=aims,
        start_timeout_s=bench.start_timeout_s,
    )
    with run_app(config) as running:
        key = Path(running.api_key_file).read_text().split()[0]
        yield BenchClient(running.url, running.model, key, bench.deadline_s, keep_tokens=True)


@asynccontextmanager
async def _watching() -> AsyncIterator[Watched]:
    async with Watched.over(_standing()) as watched:
        yield watched


def _standing() -> Standing:
    """Both workers, asked how they stand; no order comes with it."""
    handles = [handle_for_threads(role) for role in ("prefill", "decode")]

    async def ask() -> list[WorkerLoad]:
        calls = [handle.report.remote({}) for handle in handles]
        return list(await asyncio.gather(*(asyncio.to_thread(call.result, timeout_s=_REPORT_S) for call in calls)))

    return ask
