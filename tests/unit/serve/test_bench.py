"""The bench of serving counts what came, refuses what did not, and divides the right numbers."""

from __future__ import annotations

import asyncio
import time

import pytest
from tests.unit.serve.in_process import Served

from farspan.engine.bench import Work
from farspan.errors import ClusterError
from farspan.models.checkpoint import load_tokenizer
from farspan.serve.bench import Gaps, ServeBench, interference_rows, p99, throughput_rows, write_tokenizer
from farspan.serve.bench_client import BenchClient, Streamed


def client(port: int, key: str = "sk-one", deadline_s: float = 60.0) -> BenchClient:
    return BenchClient(f"http://127.0.0.1:{port}/v1", "tiny", key, deadline_s)


def test_a_streamed_answer_has_as_many_tokens_as_asked_and_its_times_go_on(served: Served, port):
    prompt = [5, 6, 7] * 40
    began = time.perf_counter()
    first, second = (asyncio.run(client(port).stream(prompt, 30)) for _ in range(2))
    over = time.perf_counter()
    assert (first.completion_tokens, second.completion_tokens) == (30, 30)
    assert first.cached_tokens < second.cached_tokens <= len(prompt)
    times = [first.asked_s, *first.at_s, second.asked_s, *second.at_s]
    assert times == sorted(times)
    assert began <= times[0]
    assert times[-1] <= over
    assert 0 < first.first_s < over - began
    assert len(served.workers.asked) == 4


def test_answers_side_by_side_are_told_apart(served: Served, port):
    async def ask() -> list[Streamed]:
        return list(await asyncio.gather(*(client(port).stream([n + 1] * 20, 3 + n) for n in range(8))))

    assert [found.completion_tokens for found in asyncio.run(ask())] == list(range(3, 11))


@pytest.mark.parametrize(
    ("key", "prompt", "told"), [("sk-no", [1], "401"), ("sk-one", [10**9], "400"), ("sk-one", [], "400")]
)
def test_an_answer_that_is_refused_has_no_speed(served: Served, port, key, prompt, told):
    with pytest.raises(ClusterError, match=told):
        asyncio.run(client(port, key).stream(prompt, 2))


def test_an_answer_that_is_late_has_no_speed(served: Served, port):
    with pytest.raises(ClusterError, match="TimeoutError"):
        asyncio.run(client(port, deadline_s=0.01).stream([1] * 4000, 2000))


def test_gaps_are_those_between_events_inside_a_window():
    streamed = Streamed(0.0, [1.0, 1.5, 2.5, 4.0, 9.0])
    assert streamed.gaps_s(1.2, 5.0) == [1.0, 1.5]
    assert streamed.gaps_s(6.0, 8.0) == []
    assert streamed.first_s == 1.0


def test_the_part_of_the_engine_is_that_of_turns_beside_each_other():
    # A machine that grows slower by half is slower for both.
    engine, http = throughput_rows(Work("w", 2, 5, 10), 2, "ingress", [1.0, 2.0, 4.0], [2.0, 4.0, 8.0])
    assert engine["new_tokens_per_s"] == 10.0
    assert http["new_tokens_per_s"] == 5.0
    assert http["part of the engine"] == 0.5
    assert engine["listener"] == http["listener"] == "ingress"


def test_interference_compares_the_gaps_while_prompts_arrive():
    colocated, split = Gaps([0.1] * 200, [0.1] * 195 + [3.0] * 5), Gaps([0.1] * 200, [0.1] * 195 + [1.0] * 5)
    first, second = interference_rows(ServeBench(), colocated, split)
    assert (first["p99_alone_s"], first["p99_s"], second["p99_s"]) == (0.1, 3.0, 1.0)
    assert second["p99 of colocated / disaggregated"] == 3.0
    assert [p99([float(n) for n in range(1, count + 1)]) for count in (1, 2, 100, 200)] == [1, 2, 99, 198]


def test_every_token_of_the_benchs_tokenizer_has_a_text_of_its_own(tmp_path):
    write_tokenizer(tmp_path, 1000)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == 1000
    texts = [tokenizer.decode([token]) for token in range(300, 1000)]
    assert len(set(texts)) == 700
    assert all(text.isascii() and text.strip() for text in texts)
