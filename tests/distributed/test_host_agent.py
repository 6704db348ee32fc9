"""What a worker computed outlives it: the memory belongs to another process, and no half-written block is ever read."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from tests.support.host_processes import agent, ask, dying_writer, host_engine, source, started, told, worker
from tests.unit.engine.tiny import engine_config, prompts, tiny_model

from farspan.engine.engine import Engine
from farspan.engine.request import SamplingParams
from farspan.errors import TierError
from farspan.kv.host_client import join_host_cache

MIB = 1 << 20
BLOCK_BYTES = 4096


@pytest.fixture(scope="module")
def page_bytes() -> int:
    return Engine(tiny_model(), engine_config()).pool.layout.page_bytes


@pytest.fixture(scope="module")
def wanted():
    """A prompt, and what an engine without any cache answers: tokens and log-probabilities."""
    (prompt,) = prompts(61)
    engine = Engine(tiny_model(), engine_config(prefix_cache=False))
    (done,) = engine.generate([prompt], SamplingParams(max_tokens=8, logprobs=1))
    assert len(set(done.tokens)) >= 5
    return prompt, list(done.tokens), [one.logprob for one in done.logprobs]


def shared_memory_of(pid: int) -> int:
    """Bytes of files without a name that a process of ours maps."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if "memfd:farspan" in line]
    return sum(int(end, 16) - int(start, 16) for start, end in ranges)


def test_the_pages_of_a_worker_that_was_killed_are_found_by_another_process(page_bytes, wanted):
    prompt, tokens, logprobs = wanted
    with started(agent, MIB, page_bytes) as (keeper, pipe):
        address = told(pipe)
        with started(worker, address, prompt) as (first, said):
            assert told(said)[::2] == (tokens, 0)
            os.kill(first.pid, signal.SIGKILL)
            first.join(30)
        with started(worker, address, prompt) as (_, said):
            again = told(said)
        assert again[0] == tokens
        assert again[1] == pytest.approx(logprobs, abs=1e-9)
        assert again[2] == 60
        # Mappings end at a page of the machine.
        assert MIB - page_bytes < shared_memory_of(keeper.pid) <= MIB


def test_a_worker_killed_in_the_middle_of_a_store_leaves_no_block_and_no_slot_behind():
    names = [bytes([number]) * 32 for number in range(4)]
    with started(agent, 32 * BLOCK_BYTES, BLOCK_BYTES) as (_, pipe):
        cache = join_host_cache(told(pipe), BLOCK_BYTES)
        address = cache._arbiter._peer.getpeername()[1:].decode()
        with started(dying_writer, address, names, BLOCK_BYTES) as (writer, said):
            assert told(said) == 4
            assert cache.counts().num_writing == 4
            assert cache.find(names) == [False] * 4
            os.kill(writer.pid, signal.SIGKILL)
            deadline = time.monotonic() + 30
            while cache.counts().num_writing:
                assert time.monotonic() < deadline, "its slots are never given back"
        assert cache.find(names) == [False] * 4
        assert cache.counts().abandoned == 4
        content_B = torch.arange(BLOCK_BYTES, dtype=torch.uint8)
        assert cache.store([source(name, content_B) for name in names]) == 4
        targets = [torch.zeros(BLOCK_BYTES, dtype=torch.uint8) for _ in names]
        assert cache.fetch(names, targets) == [True] * 4
        assert all(torch.equal(target, content_B) for target in targets)
        cache.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_workers_go_on_without_an_agent_that_is_gone_or_frozen_and_say_so_once(how, page_bytes, wanted, caplog):
    prompt, tokens, logprobs = wanted
    with started(agent, MIB, page_bytes) as (keeper, pipe):
        engine = host_engine([told(pipe)], timeout_s=0.3, kv_bytes=20 * page_bytes)
        assert ask(engine, prompt)[::2] == (tokens, 0)
        ask(engine, [3] * 70)
        assert ask(engine, prompt)[2] == 60, "from host memory: the pool holds one prompt"
        os.kill(keeper.pid, how)
        for number in range(3):
            ask(engine, [number] * 70)
            found = ask(engine, prompt)
            assert found[::2] == (tokens, 0)
            assert found[1] == pytest.approx(logprobs, abs=1e-9)
    said = [record.message for record in caplog.records if "no longer kept in host memory" in record.message]
    assert len(said) == 1
    assert "the agent is lost" in said[0]


def test_a_worker_whose_agent_was_lost_joins_the_one_in_its_place(page_bytes, wanted):
    prompt, tokens, _ = wanted
    addresses: list[str] = []
    with started(agent, MIB, page_bytes) as (keeper, pipe):
        addresses.append(told(pipe))
        engine = host_engine(addresses, kv_bytes=20 * page_bytes)
        ask(engine, prompt)
        os.kill(keeper.pid, signal.SIGKILL)
        assert ask(engine, [3] * 70)[2] == 0
        assert engine.host.use.lost
    engine.host._link.rejoin_s = 0.0
    with started(agent, MIB, page_bytes) as (_, pipe):
        addresses.append(told(pipe))
        deadline = time.monotonic() + 60
        while engine.host.use.lost:
            assert time.monotonic() < deadline, "it does not join"
            ask(engine, [5] * 70)
        assert ask(engine, prompt)[::2] == (tokens, 0)
        ask(engine, [3] * 70)
        assert ask(engine, prompt)[::2] == (tokens, 60)


def test_nobody_joins_an_agent_with_slots_of_another_size_or_one_that_is_not_there():
    with started(agent, 8 * BLOCK_BYTES, BLOCK_BYTES) as (_, pipe):
        address = told(pipe)
        with pytest.raises(TierError, match="slots of 4096 bytes, not of 512"):
            join_host_cache(address, 512)
    with pytest.raises(TierError, match="does not answer"):
        join_host_cache("farspan-host-nobody", 512)
