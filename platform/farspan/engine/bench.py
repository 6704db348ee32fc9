"""The engine beside its peers on the same checkpoint and prompts, in one run: `farspan bench engine`.

Every contender is a process of its own that is asked through pipes (bench_contenders.py); they take turns, so that a
machine whose speed drifts drifts for all, and who is not asked stands still. Prompts are new in every turn: nobody
finds an earlier turn's in a cache. Answers are greedy. Before anything is timed, each contender's tokens are held
against transformers in fp32: a token that is not the best one within what bf16 can tell is a wrong answer, which has no
speed.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from farspan.engine.bench_contenders import BATCHED, FARSPAN, GENERATE, VLLM
from farspan.errors import ClusterError, ConfigError
from farspan.models.checkpoint import load_causal_lm, make_config, random_causal_lm

logger = logging.getLogger(__name__)

CONTENDERS = Path(__file__).with_name("bench_contenders.py")
GOAL, GOAL_BANDWIDTH = 1.5, 0.7
START = "start to first token"
# A contender that answers nobody any more has this long to end by itself.
_START_DEADLINE_S, _END_S = 600.0, 30.0
# How far below the best logit, in standard deviations of a row, the token of a bf16 engine may be.
_MOST_BELOW = 0.15
_CHECKED = 4


@dataclass(frozen=True, slots=True)
class Work:
    """Prompts of one question: `count` of `shared` common tokens and `own` ones each, answered by `new_tokens`."""

    name: str
    count: int
    own: int
    new_tokens: int
    shared: int = 0

    @property
    def is_decode(self) -> bool:
        """Of one request: what the memory that holds the weights bounds."""
        return self.count == 1 and self.new_tokens > 1

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        common = torch.randint(vocab_size, (self.shared,), generator=generator).tolist()
        own = torch.randint(vocab_size, (self.count, self.own), generator=generator).tolist()
        return [common + tokens for tokens in own]


@dataclass(frozen=True, kw_only=True)
class EngineBench:
    """What is measured. The defaults are a Llama of 82 million weights."""

    settings: dict[str, int] = field(
        default_factory=lambda: {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 9,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "vocab_size": 32000,
            "max_position_embeddings": 8192,
        }
    )
    dtype: str = "bfloat16"
    works: tuple[Work, ...] = (
        Work("16 x (512 in + 128 out)", 16, 512, 128),
        Work("decode of one request", 1, 16, 128),
        Work("prefill of 4096 tokens", 1, 4096, 1),
        Work("64 requests, 2048 tokens shared", 64, 32, 16, shared=2048),
    )
    starts: int = 1
    """How often the start of each is measured, after one that fills the file cache."""
    turns: int = 3
    threads: int = field(default_factory=torch.get_num_threads)
    kv_bytes: int = 2 << 30
    deadline_s: float = 300.0
    """Longest time for one question: a peer that needs longer is not timed on that work."""
    peers: tuple[str, ...] = (GENERATE, BATCHED)
    """Who runs beside farspan, vLLM not counted."""
    vllm_python: str | None = None
    """Python of an environment that holds vLLM."""


class LateError(ClusterError):
    """A contender that may still answer, but not in time."""


class Contender:
    """A running process and its pipes. It stands still while it is not asked: some spin while they wait."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], answers: int) -> None:
        self.name, self._process, self._answers = name, process, answers
        self._rest = b""
        assert process.stdin is not None
        self._questions = process.stdin.fileno()
        os.set_blocking(self._questions, False)

    def ask(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, deadline_s: float
    ) -> tuple[float, list[list[int]]]:
        """(seconds, tokens of each answer). Raises ClusterError when it died, LateError at the deadline."""
        left = json.dumps({"prompts": prompts, "new_tokens": new_tokens}).encode() + b"\n"
        end = time.monotonic() + deadline_s
        self._signal(signal.SIGCONT)
        try:
            while left:
                self._wait(self._questions, selectors.EVENT_WRITE, end)
                left = left[os.write(self._questions, left) :]
        except BrokenPipeError:
            raise self._dead() from None
        found = self.hear(end - time.monotonic())
        self.stand_still()
        return found["seconds"], found["tokens"]

    def stand_still(self) -> None:
        """Stop its processes until it is asked again."""
        self._signal(signal.SIGSTOP)

    def hear(self, deadline_s: float) -> dict[str, Any]:
        """Its next line. Raises as `ask` does."""
        end = time.monotonic() + deadline_s
        while b"\n" not in self._rest:
            self._wait(self._answers, selectors.EVENT_READ, end)
            read = os.read(self._answers, 1 << 20)
            if not read:
                raise self._dead()
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\n")
        return cast(dict[str, Any], json.loads(line))

    def _wait(self, descriptor: int, event: int, end: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, event)
            if not selector.select(max(0.0, end - time.monotonic())):
                raise LateError(f"{self.name} gave no answer in time")

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _dead(self) -> ClusterError:
        return ClusterError(f"{self.name} died with code {self._process.wait(_END_S)}")


@contextmanager
def contender(name: str, folder: Path, bench: EngineBench, log: Path) -> Iterator[Contender]:
    """A contender that is ready; what it prints goes to `log`. Its processes have ended afterwards."""
    python = bench.vllm_python if name == VLLM else sys.executable
    assert python is not None, "asked for only where there is one"
    ours, theirs = os.pipe()
    command = [python, str(CONTENDERS), name, str(folder), str(bench.threads), str(bench.kv_bytes), str(theirs)]
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(theirs,),
                env={**os.environ, **_environment(bench)},
                start_new_session=True,
            )
    except OSError:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    try:
        found = Contender(name, process, ours)
        try:
            found.hear(_START_DEADLINE_S)
        except ClusterError as problem:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise ClusterError(f"{problem}: {' '.join(last)[:300]}") from None
        found.stand_still()
        yield found
    finally:
        _end(process)
        os.close(ours)


def _environment(bench: EngineBench) -> dict[str, str]:
    """What libraries read before they are asked for anything."""
    vllm = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": str(max(1, bench.kv_bytes >> 30))}
    return {"OMP_NUM_THREADS": str(bench.threads), **vllm}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Whoever has no question left ends by itself; then whatever is left of it, its own processes too."""
    assert process.stdin is not None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGCONT)
    with suppress(BrokenPipeError):
        process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(_END_S)


def bench_engine(bench: EngineBench | None = None) -> list[dict[str, Any]]:
    """One row per work and contender: seconds, tokens/s and farspan's speed over it; then decode beside memory's bound.

    A contender whose answers are not the model's has `wrong` in its row.

    Raises:
        ConfigError: there is no Python where vLLM's should be.
        ClusterError: a contender died.
    """
    bench = bench or EngineBench()
    names = [FARSPAN, *bench.peers]
    if bench.vllm_python is not None:
        if not Path(bench.vllm_python).is_file():
            raise ConfigError("--vllm-env", "must hold bin/python", bench.vllm_python, "give a virtual environment")
        names.append(VLLM)
    with tempfile.TemporaryDirectory(prefix="farspan-bench-") as scratch:
        return _Comparison(bench, names, Path(scratch)).rows()


class _Running:
    """Contenders by name; all of them end when the block does."""

    def __init__(self) -> None:
        self._stacks: dict[str, ExitStack] = {}
        self._contenders: dict[str, Contender] = {}

    def __enter__(self) -> None:
        return None

    def __exit__(self, *problem: object) -> None:
        with ExitStack() as everybody:
            for name in list(self._stacks):
                everybody.callback(self.drop, name)

    def put(self, name: str, opened: AbstractContextManager[Contender]) -> None:
        stack = ExitStack()
        self._contenders[name] = stack.enter_context(opened)
        self._stacks[name] = stack

    def get(self, name: str) -> Contender:
        return self._contenders[name]

    def each(self) -> list[Contender]:
        return list(self._contenders.values())

    def drop(self, name: str) -> None:
        del self._contenders[name]
        self._stacks.pop(name).close()


class _Comparison:
    def __init__(self, bench: EngineBench, names: list[str], scratch: Path) -> None:
        self._bench, self._names, self._scratch = bench, names, scratch
        self._folder = scratch / "model"
        self._running = _Running()
        self._num_weights, self._weight_bytes = write_checkpoint(bench, self._folder)
        self._vocab_size = bench.settings["vocab_size"]
        self._bandwidths: dict[Work, list[float]] = {}

    def rows(self) -> list[dict[str, Any]]:
        starts = {name: self._start(name) for name in self._names} if self._bench.starts else {}
        with self._running:
            for name in self._names:
                self._open(name)
            wrong = self._wrong()
            seconds = {work: self._seconds(work) for work in self._bench.works}
        rows = self._rows(START, 1, starts, wrong) if starts else []
        for work in self._bench.works:
            rows += self._rows(work.name, work.count * work.new_tokens, seconds[work], wrong)
        return rows if FARSPAN in wrong else [*rows, *self._bound_rows(seconds)]

    def _open(self, name: str) -> None:
        logger.info("starting %s", name)
        self._running.put(name, contender(name, self._folder, self._bench, self._scratch / f"{name}.log"))

    def _start(self, name: str) -> list[float]:
        """Seconds from nothing to the first token."""
        found = []
        for turn in range(1 + self._bench.starts):
            began = time.perf_counter()
            with contender(name, self._folder, self._bench, self._scratch / f"{name}.log") as it:
                it.ask(Work("first", 1, 16, 1).prompts(self._vocab_size, turn), 1, self._bench.deadline_s)
                found.append(time.perf_counter() - began)
            logger.info("%s: %s in %.1f s", name, START, found[-1])
        return found[1:]

    def _wrong(self) -> dict[str, str]:
        """Whose tokens are not the model's."""
        prompts = Work("check", _CHECKED, 48, 12).prompts(self._vocab_size, -1)
        model = load_causal_lm(self._folder, torch.float32)
        wrong = {}
        for it in self._running.each():
            _, answers = it.ask(prompts, 12, self._bench.deadline_s)
            below = max(how_far_below(model, p, a) for p, a in zip(prompts, answers, strict=True))
            logger.info("%s: its tokens are at most %.3f deviations below the best", it.name, below)
            # Not above: a NaN is no success.
            if not below <= _MOST_BELOW:
                wrong[it.name] = f"a token is {below:.2g} deviations below the best; allowed {_MOST_BELOW}"
        return wrong

    def _seconds(self, work: Work) -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {name: [] for name in self._names}
        late: set[str] = set()
        for turn in range(self._bench.turns):
            prompts = work.prompts(self._vocab_size, turn)
            for name in self._names:
                if name in late:
                    continue
                try:
                    found, answers = self._running.get(name).ask(prompts, work.new_tokens, self._bench.deadline_s)
                except LateError as problem:
                    logger.info("%s: %s", work.name, problem)
                    late.add(name)
                    # What it still computes would slow the others down, and answer the next question.
                    self._running.drop(name)
                    self._open(name)
                    continue
                assert [len(a) for a in answers] == [work.new_tokens] * work.count, f"{name} answered something else"
                seconds[name].append(found)
                if name == FARSPAN and work.is_decode:
                    # At once: the memory of a machine that others use too is faster and slower by the minute.
                    num_bytes = work.new_tokens * self._weight_bytes
                    self._bandwidths.setdefault(work, []).append(read_bandwidth(num_bytes))
                logger.info("%s: %s in %.2f s", name, work.name, found)
        return {name: [] if name in late else times for name, times in seconds.items()}

    def _rows(
        self, work: str, new_tokens: int, seconds: dict[str, list[float]], wrong: dict[str, str]
    ) -> list[dict[str, Any]]:
        # A wrong answer has no speed, neither alone nor beside another.
        ours = [] if FARSPAN in wrong else seconds[FARSPAN]
        rows: list[dict[str, Any]] = []
        for name, times in seconds.items():
            row: dict[str, Any] = {"work": work, "contender": name, "weights": self._num_weights}
            if name in wrong:
                rows.append({**row, "wrong": wrong[name]})
            elif not times:
                rows.append({**row, "not_measured": f"more than {self._bench.deadline_s:.0f} s"})
            else:
                middle = statistics.median(times)
                row |= {"seconds": middle, "new_tokens_per_s": new_tokens / middle}
                if name != FARSPAN and ours:
                    row["speed of farspan / peer"] = statistics.median(
                        theirs / mine for mine, theirs in zip(ours, times, strict=True)
                    )
                rows.append(row)
        return rows

    def _bound_rows(self, seconds: dict[Work, dict[str, list[float]]]) -> list[dict[str, Any]]:
        """How much of the time of a single request's decode reading the weights alone takes, turn by turn."""
        rows = []
        for work, bandwidths in self._bandwidths.items():
            turns = list(zip(bandwidths, seconds[work][FARSPAN], strict=False))
            if turns:
                reached = [self._weight_bytes / bandwidth / (took / work.new_tokens) for bandwidth, took in turns]
                rows.append(
                    {
                        "work": work.name,
                        "memory_bytes_per_s": statistics.median(bandwidths),
                        "part of the bound": statistics.median(reached),
                        "goal": GOAL_BANDWIDTH,
                    }
                )
        return rows


def bench_model(settings: dict[str, int], dtype: str) -> PreTrainedModel:
    """A random Llama, the same everywhere. No token ends an answer: whoever is asked computes as many as are wanted."""
    fixed = {"tie_word_embeddings": True, "dtype": dtype, "eos_token_id": None, "bos_token_id": None}
    return random_causal_lm(make_config("llama", {**settings, **fixed}, {}), 0).to(getattr(torch, dtype))


def write_checkpoint(bench: EngineBench, folder: Path) -> tuple[int, int]:
    """A random model without a tokenizer; (weights, their bytes)."""
    model = bench_model(bench.settings, bench.dtype)
    model.save_pretrained(folder)
    return model.num_parameters(), sum(p.numel() * p.element_size() for p in model.parameters())


def how_far_below(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """The furthest that a token of a greedy answer is below the best, in standard deviations of its row of logits."""
    tokens_T = torch.tensor([*prompt, *answer], device=getattr(model, "device", None))
    with torch.inference_mode():
        logits_TV: Tensor = model(input_ids=tokens_T[None], use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    chosen_T = logits_TV.gather(1, tokens_T[len(prompt) :, None])[:, 0]
    return float(((logits_TV.amax(1) - chosen_T) / logits_TV.std(1)).max())


def read_bandwidth(num_bytes: int) -> float:
    """Bytes per second at which sums over far more than any cache holds read at least `num_bytes`."""
    big = torch.ones(1 << 28, dtype=torch.float32, device="cuda" if torch.cuda.is_available() else "cpu")
    big.sum().item()
    rounds = -(-num_bytes // big.nbytes)
    began = time.perf_counter()
    for _ in range(rounds):
        big.sum().item()
    return rounds * big.nbytes / (time.perf_counter() - began)
