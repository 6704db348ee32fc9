"""Pages of an engine over ranks arrive at another one whole, each rank's part from the same rank, or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist
from tests.support.gangs import make
from tests.support.ranks import RankPool
from tests.unit.engine.split import NUM_TOKENS
from tests.unit.engine.tiny import engine_config, prompts, reference

from farspan.engine.cut import Share
from farspan.engine.engine import Engine
from farspan.engine.follow import follow
from farspan.engine.gang import Gang
from farspan.engine.ranked import RankedTransport
from farspan.engine.request import SamplingParams
from farspan.errors import TransferError
from farspan.kv.puller import Puller
from farspan.kv.ticket import KvTicket, LeaseTable
from farspan.kv.transports.nixl import NixlTransport

GREEDY = SamplingParams(max_tokens=NUM_TOKENS)
LENGTHS = (30, 21)


def split_here(name: str, harm: str) -> list[list[int] | str]:
    """Ranks 0 and 1 compute prompts, ranks 2 and 3 go on with the answers; what rank 2 got of each.

    Leaders talk as two workers do: by plain values, here in the group of both.
    """
    pairs = [dist.new_group([first, first + 1], timeout=timedelta(seconds=60)) for first in (0, 2)]
    leaders = dist.new_group([0, 2], timeout=timedelta(seconds=120))
    me = dist.get_rank()
    group = pairs[me // 2]
    gang = Gang(group, group, 60.0)
    model, config = make(name), engine_config(max_batch_tokens=16, tensor_parallel=2)
    share = Share.of(model, gang)
    if not gang.leads:
        follow(model, config, share, _Harmed if harm == "a part" and me == 1 else NixlTransport)
        return []
    engine = Engine(model, config, share=share)
    transport = RankedTransport(NixlTransport(engine.pool), engine.leader, engine.pool)

    def exchange(mine: object) -> object:
        told: list[object] = [None, None]
        dist.all_gather_object(told, mine, group=leaders)
        return told[1 - me // 2]

    try:
        return _prefill(engine, transport, exchange, harm) if me == 0 else _decode(engine, transport, exchange)
    finally:
        # Both ends stay until no read is under way.
        exchange("over")
        engine.check_integrity()
        transport.close()
        engine.close()


class _Harmed(NixlTransport):
    """Serves another byte than was computed, in the part of one rank."""

    def address(self):
        harmed = self._pool.digests

        def digests(pages):
            told = harmed(pages)
            for page in pages:
                self._pool.storage_PB[page, 3] ^= 16
            return told

        self._pool.digests = digests
        return super().address()


def _prefill(engine: Engine, transport: RankedTransport, exchange: Callable, harm: str) -> list:
    leases = LeaseTable(engine.pool, lease_s=60.0)
    for number, prompt in enumerate(prompts(*LENGTHS)):
        engine.add(f"r{number}", prompt, GREEDY, prefill_only=True)
        while not (events := engine.step()):
            pass
        pages, num_tokens = engine.take(f"r{number}")
        ticket = leases.offer(f"r{number}", pages, num_tokens, transport.address(), time.time())
        if harm == "re-used":
            # What was offered is given away before anybody comes for it.
            leases.release(ticket.ticket_id)
            engine.pool.free(engine.pool.alloc(engine.pool.num_free))
        if harm == "one rank":
            ticket = replace(ticket, source=replace(ticket.source, ranks=()))
        exchange((events[0].token, ticket))
        exchange("fetched")
        leases.release(ticket.ticket_id)
    assert engine.pool.num_held == 0
    return []


def _decode(engine: Engine, transport: RankedTransport, exchange: Callable) -> list[list[int] | str]:
    puller = Puller(engine.pool, transport, deadline_s=30.0, part_bytes=2 * engine.pool.layout.page_bytes)
    found: list[list[int] | str] = []
    for number, prompt in enumerate(prompts(*LENGTHS)):
        first, ticket = exchange(None)
        pages = _fetch(engine, puller, ticket)
        exchange("fetched")
        if isinstance(pages, str):
            found.append(pages)
            continue
        engine.adopt(f"r{number}", prompt, GREEDY, [first], pages)
        found.append([first, *(event.token for _ in range(NUM_TOKENS - 1) for event in engine.step())])
    assert engine.pool.num_held == 0
    return found


def _fetch(engine: Engine, puller: Puller, ticket: KvTicket) -> list[int] | str:
    pages = engine.pool.alloc(len(ticket.pages))
    assert pages is not None
    try:
        puller.start(ticket, pages, time.monotonic(), time.time())
    except TransferError as problem:
        engine.pool.free(pages)
        return problem.reason
    ends_s = time.monotonic() + 60
    while not (arrivals := puller.poll(time.monotonic())):
        assert time.monotonic() < ends_s, "the transfer did not end"
    return arrivals[0].pages or str(arrivals[0].error)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_an_answer_goes_on_with_pages_that_two_ranks_fetched_from_two_ranks(ranks: RankPool, name):
    found = ranks.run(split_here, 4, name, "")[2]
    engine = Engine(make(name), engine_config())
    expected = [list(done.tokens) for done in engine.generate(prompts(*LENGTHS), GREEDY)]
    assert found == expected
    if name == "llama":
        assert expected == [reference(make(name), prompt, NUM_TOKENS) for prompt in prompts(*LENGTHS)]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("a part", "arrived with other bytes than were offered"),
        ("re-used", "of the source was re-used"),
        ("one rank", "the source names 1 ranks, its layout 2"),
    ],
)
def test_pages_of_which_any_ranks_part_is_not_what_was_offered_are_not_taken(ranks: RankPool, harm, said):
    found = ranks.run(split_here, 4, "llama", harm)[2]
    assert len(found) == len(LENGTHS)
    assert all(isinstance(reason, str) and said in reason for reason in found), found
