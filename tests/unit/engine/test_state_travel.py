"""A recurrent state goes where its sequence goes: to another worker and to host memory, bit by bit or not at all."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
import torch
from tests.support.double import DoublePrecision
from tests.support.zoo import VOCAB, zoo_model
from tests.unit.engine.oracle import whole_logits
from tests.unit.engine.split import NUM_TOKENS, Split
from tests.unit.engine.tiny import engine_config
from torch import Tensor

from farspan.engine.engine import Engine
from farspan.engine.request import SamplingParams
from farspan.engine.terms import Terms
from farspan.errors import RequestError, TransferError
from farspan.kv.puller import Puller
from farspan.kv.ticket import KvTicket, LeaseTable
from farspan.kv.transports.memory import MemoryNetwork, MemoryTransport

# A delta rule, Mamba-2 beside attention, beside it in the same layer, a short convolution, and Mamba-1.
HYBRIDS = ("qwen3_next", "bamba", "granitemoehybrid", "falcon_h1", "lfm2", "jamba")


@pytest.fixture(autouse=True)
def double_precision():
    with DoublePrecision():
        yield


@pytest.fixture
def split(request):
    made = Split(*request.param)
    yield made
    made.close()


def row(length: int, seed: int = 1) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def watch_logits(engine: Engine) -> list[Tensor]:
    """Whatever the engine's runner gives from now on."""
    found: list[Tensor] = []
    run = engine._runner.run

    def watched(pieces):
        found.append(run(pieces))
        return found[-1]

    engine._runner.run = watched  # type: ignore[method-assign]
    return found


def count_preemptions(engine: Engine) -> list[bool]:
    """Whether each preempted sequence from now on waits in host memory, which costs nothing."""
    kept: list[bool] = []
    preempt = engine._holdings.preempt

    def counted(sequence, *, offload):
        preempt(sequence, offload=True)
        kept.append(sequence.kept is not None)

    engine._holdings.preempt = counted  # type: ignore[method-assign]
    return kept


def assert_nothing_is_held(*engines: Engine) -> None:
    for engine in engines:
        engine.check_integrity()
        assert engine.pool.num_free == engine.pool.num_pages
        assert engine.states is not None
        assert engine.states.num_free == engine.states.num_slots


@pytest.mark.parametrize(
    "split", [*((a, "memory") for a in HYBRIDS), ("qwen3_next", "nixl"), ("qwen3_next", "object_store")], indirect=True
)
@pytest.mark.parametrize("length", [1, 8, 37])
def test_prefill_here_and_decode_there_gives_the_tokens_and_logits_of_one_plain_forward(split, length):
    prompt, params = row(length), SamplingParams(max_tokens=NUM_TOKENS)
    first, ticket = split.offer(prompt, params)
    assert split.prefill.states.num_free == split.prefill.states.num_slots, "a lease holds pages, never a slot"
    assert len(ticket.pages) > split.prefill.pool.layout.num_pages(length)
    arrival = split.pull(ticket)
    assert arrival.pages is not None
    assert split.leases.release(ticket.ticket_id)
    logits = watch_logits(split.decode)
    answer = split.finish(prompt, params, first, arrival.pages)
    wanted = whole_logits(split.prefill._runner._model, [*prompt, *answer])[length - 1 : -1]
    assert answer == wanted.argmax(1).tolist()
    assert len(set(answer)) >= 6
    assert float((torch.cat(logits) - wanted[1:]).abs().max()) <= 1e-8 * float(wanted.abs().max().clamp_min(1))
    assert_nothing_is_held(split.prefill, split.decode)


@pytest.mark.parametrize("split", [("qwen3_next", "memory"), ("bamba", "memory")], indirect=True)
@pytest.mark.parametrize("damage", ["stale epoch", "torn state", "another state layout", "no state"])
def test_a_damaged_state_is_never_used_and_the_answer_is_computed_again(split, damage):
    prompt, params = row(30), SamplingParams(max_tokens=NUM_TOKENS)
    expected = list(split.decode.generate([prompt], params)[0].tokens)
    first, ticket = split.offer(prompt, params)
    pool = split.prefill.pool
    state_page = ticket.pages[-1].page
    if damage == "stale epoch":
        before = pool.storage_PB.clone()
        split.leases.release(ticket.ticket_id)
        pool.free(pool.alloc(pool.num_free))
        # The very same bytes: only the epochs tell.
        pool.storage_PB.copy_(before)
    elif damage == "torn state":
        pool.storage_PB[state_page, 3] ^= 1
    elif damage == "another state layout":
        layout = replace(pool.layout, state=replace(split.prefill.states.layout, counted_bytes=1).fingerprint())
        ticket = replace(ticket, layout=layout.fingerprint())
    else:
        ticket = replace(ticket, pages=ticket.pages[: pool.layout.num_pages(30)])
    if damage in ("another state layout", "no state"):
        pages = split.decode.pool.alloc(len(ticket.pages))
        with pytest.raises(TransferError, match=r"another model or KV layout|pages for 30 tokens"):
            split.puller.start(ticket, pages, time.monotonic(), time.time())
        split.decode.pool.free(pages)
    else:
        arrival = split.pull(ticket)
        assert arrival.pages is None
        assert ("re-used" if damage == "stale epoch" else "other bytes") in str(arrival.error)
    split.leases.release(ticket.ticket_id)
    assert_nothing_is_held(split.prefill, split.decode)
    split.decode.add("r", prompt, params, answered=[first])
    rest = [event.token for _ in range(NUM_TOKENS - 1) for event in split.decode.step()]
    assert [first, *rest] == expected


@pytest.mark.parametrize("split", [("qwen3_next", "memory")], indirect=True)
def test_cancelled_before_or_after_it_travelled_a_state_leaves_nothing_behind(split):
    prompt, params = row(20), SamplingParams(max_tokens=NUM_TOKENS)
    split.prefill.add("taken", prompt, params, prefill_only=True)
    while not split.prefill.step():
        pass
    split.prefill.cancel("taken")
    first, ticket = split.offer(prompt, params)
    arrival = split.pull(ticket)
    split.leases.release(ticket.ticket_id)
    split.decode.adopt("r", prompt, params, [first], arrival.pages)
    split.decode.check_integrity()
    split.decode.cancel("r")
    assert_nothing_is_held(split.prefill, split.decode)


def small(architecture: str, num_pages: int, **settings: object) -> Engine:
    """An engine of three states and so many pages."""
    with_room = Engine(zoo_model(architecture), engine_config(max_sequences=3))
    assert with_room.states is not None
    kv_bytes = 3 * with_room.states.layout.cost_bytes + num_pages * with_room.pool.layout.cost_bytes
    engine = Engine(zoo_model(architecture), engine_config(kv_bytes=kv_bytes, max_sequences=3, **settings))
    assert (engine.pool.num_pages, engine.states and engine.states.num_slots) == (num_pages, 3)
    return engine


@pytest.mark.parametrize("architecture", ["granitemoehybrid"])
def test_a_preempted_sequence_comes_back_from_host_memory_with_its_state_and_computes_nothing_again(architecture):
    engine = Engine(zoo_model(architecture), engine_config(offload_bytes=1024 * 1024))
    prompt, params = row(23), SamplingParams(max_tokens=NUM_TOKENS)
    expected = list(engine.generate([prompt], params)[0].tokens)
    computed = 0
    run = engine._runner.run

    def counted(pieces):
        nonlocal computed
        computed += sum(len(piece.tokens) for piece in pieces)
        return run(pieces)

    engine._runner.run = counted  # type: ignore[method-assign]
    engine.add("r", prompt, params)
    answer: list[int] = []
    while engine.has_work:
        answer += [event.token for event in engine.step()]
        if len(answer) in (3, 4, 11) and engine._running:
            engine._preempt(engine._running[0], offload=True)
            assert_nothing_is_held(engine)
            # Whoever comes in between gets the very slot and pages.
            between = row(30, seed=len(answer))
            engine.add(f"between {len(answer)}", between, SamplingParams(max_tokens=1), terms=Terms(priority=1))
            computed -= 30
            while any(s.request_id != "r" for s in (*engine._running, *engine._waiting)):
                answer += [event.token for event in engine.step() if event.request_id == "r"]
    assert answer == expected
    assert computed == 23 + NUM_TOKENS - 1
    assert_nothing_is_held(engine)
    assert engine._holdings._offload._tier.stats().used_bytes == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("offload_bytes", [0, 1024 * 1024])
def test_two_full_workers_answer_right_whoever_must_wait_give_way_or_is_cancelled(offload_bytes):
    chance = random.Random(7)
    network = MemoryNetwork()
    prefill = small("qwen3_next", 24, max_batch_tokens=16)
    decode = small("qwen3_next", 24, max_batch_tokens=16, offload_bytes=offload_bytes)
    preempted = count_preemptions(decode)
    source, receiver = (MemoryTransport(engine.pool, network) for engine in (prefill, decode))
    leases, puller = LeaseTable(prefill.pool, lease_s=60.0), Puller(decode.pool, receiver, deadline_s=30.0)
    prompts = {f"r{number}": row(chance.randint(1, 30), seed=number) for number in range(24)}
    params = SamplingParams(max_tokens=12)
    answers: dict[str, list[int]] = {name: [] for name in prompts}
    unsent = list(prompts)
    offered: list[KvTicket] = []
    cancelled: set[str] = set()
    adopted = steps = 0
    while unsent or offered or prefill.has_work or decode.has_work:
        steps += 1
        assert steps < 2000, "nothing gets on"
        while unsent and len(prefill._waiting) < 2:
            prefill.add(unsent[0], prompts[unsent[0]], params, prefill_only=True)
            unsent.pop(0)
        for event in prefill.step():
            answers[event.request_id].append(event.token)
            pages, num_tokens = prefill.take(event.request_id)
            offered.append(leases.offer(event.request_id, pages, num_tokens, source.address(), time.time()))
        if offered and (pages := decode.pool.alloc(len(offered[0].pages))) is not None:
            ticket = offered.pop(0)
            puller.start(ticket, pages, time.monotonic(), time.time())
            (arrival,) = puller.poll(time.monotonic())
            leases.release(ticket.ticket_id)
            decode.adopt(
                ticket.request_id, prompts[ticket.request_id], params, answers[ticket.request_id], arrival.pages
            )
            adopted += 1
            if chance.random() < 0.15:
                decode.cancel(ticket.request_id)
                cancelled.add(ticket.request_id)
        for event in decode.step():
            answers[event.request_id].append(event.token)
        prefill.check_integrity(leases.owned(time.time()))
        decode.check_integrity()
    assert adopted == len(prompts)
    assert 0 < len(cancelled) < 12
    assert len(preempted) > 5
    # A state that waits in host memory went there from a slot, or from the pages it arrived in.
    assert any(preempted) == bool(offload_bytes)
    for name in prompts.keys() - cancelled:
        choices = whole_logits(prefill._runner._model, [*prompts[name], *answers[name]])[len(prompts[name]) - 1 : -1]
        assert answers[name] == choices.argmax(1).tolist()
        assert len(answers[name]) == 12
    assert_nothing_is_held(prefill, decode)


def test_a_prompt_whose_state_would_find_no_pages_is_refused_before_it_is_computed():
    engine = small("qwen3_next", 40)
    room = (40 - engine.pool.layout.num_state_pages) * 4
    with pytest.raises(RequestError, match=r"in 41 pages, engine\.kv_bytes holds 40"):
        engine.add("r", row(room + 1), SamplingParams(max_tokens=1), prefill_only=True)
    engine.add("r", row(room), SamplingParams(max_tokens=1), prefill_only=True)
    events = []
    while not events:
        events = engine.step()
    assert len(engine.take("r")[0]) == 40
