"""Pages fetched while their prompt is still computed are those its ticket names, and the answer is the same."""

from __future__ import annotations

import time

import pytest
import torch
from tests.support.double import DoublePrecision
from tests.support.zoo import VOCAB, zoo_model
from tests.unit.engine.split import NUM_TOKENS, Split
from transformers import PreTrainedModel

from farspan.engine.request import SamplingParams
from farspan.kv.puller import Arrival
from farspan.kv.ticket import KvOffer, KvTicket

# Everything kept; windows of 6; windows and full attention; chunks of 8; states beside pages; latent attention.
KINDS = ("llama", "mistral", "gemma3_text", "gpt_oss", "llama4_text", "qwen3_next", "lfm2", "deepseek_v3")
SETTINGS = {"llama4_text": {"attn_temperature_tuning": False, "layer_types": ["chunked_attention", "full_attention"]}}
PARAMS = SamplingParams(max_tokens=NUM_TOKENS)


@pytest.fixture(autouse=True)
def double_precision():
    with DoublePrecision():
        yield


def model_of(architecture: str) -> PreTrainedModel:
    return zoo_model(architecture, **SETTINGS.get(architecture, {}))


@pytest.fixture
def split(request):
    made = Split(request.param, "memory", model_of)
    yield made
    made.close()


def row(length: int, seed: int = 1) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Followed:
    """A prompt that is computed on one side, 16 tokens at a time, and followed by the other."""

    def __init__(self, split: Split, prompt: list[int]) -> None:
        self.split, self.prompt = split, prompt
        self.offers: list[KvOffer] = []
        self.read: list[int] = []
        read = split.receiver.read_pages

        def counted(source, remote, local):
            self.read += remote
            return read(source, remote, local)

        split.receiver.read_pages = counted
        split.prefill.add("r", prompt, PARAMS, prefill_only=True)

    def step(self) -> int | None:
        """One iteration, and what is new told to the other side; the first token once it is there."""
        events = self.split.prefill.step()
        for name, life, pages in self.split.prefill.growing():
            source = self.split.source.address()
            offer = self.split.leases.grow(name, life, pages, len(self.prompt), source, time.time())
            if offer is not None:
                self.offers.append(offer)
                assert self.split.puller.follow(offer, 0, time.monotonic(), time.time())
        assert self.split.puller.poll(time.monotonic()) == []
        return events[0].token if events else None

    def complete(self) -> tuple[int, KvTicket]:
        while (first := self.step()) is None:
            pass
        pages, num_tokens = self.split.prefill.take("r")
        source = self.split.source.address()
        return first, self.split.leases.offer("r", pages, num_tokens, source, time.time())

    def arrive(self, ticket: KvTicket) -> Arrival:
        assert self.split.puller.complete(ticket, time.monotonic(), time.time())
        (arrival,) = self.split.puller.poll(time.monotonic())
        assert arrival.pages is not None
        return arrival

    def settle(self, ticket: KvTicket) -> None:
        assert self.split.leases.release(ticket.ticket_id)
        for engine in (self.split.prefill, self.split.decode):
            engine.check_integrity()
            assert engine.pool.num_free == engine.pool.num_pages


@pytest.mark.parametrize("split", KINDS, indirect=True)
@pytest.mark.parametrize("length", [16, 17, 70])
def test_pages_fetched_on_the_way_give_the_answer_of_one_place(split, length):
    prompt = row(length)
    alone = list(split.decode.generate([prompt], PARAMS)[0].tokens)
    followed = Followed(split, prompt)
    first, ticket = followed.complete()
    offered = [ref for offer in followed.offers for ref in offer.pages]
    assert {offer.ticket_id for offer in followed.offers} <= {ticket.ticket_id}
    assert tuple(offered) == ticket.pages[: len(offered)]
    if length == 70:
        assert len(followed.offers) == 4 or split.prefill.pool.layout.gives_back
    if not offered:
        # One iteration computes it all, or a window that nothing offered lies in: the ticket brings it.
        arrival = split.pull(ticket)
        assert arrival.pages is not None
    else:
        arrival = followed.arrive(ticket)
        assert arrival.num_early == len(offered)
    assert followed.read == [ref.page for ref in ticket.pages]
    assert split.finish(prompt, PARAMS, first, arrival.pages) == alone
    assert len(set(alone)) >= 4
    followed.settle(ticket)


@pytest.mark.parametrize("split", ["gemma3_text", "qwen3_next"], indirect=True)
def test_something_is_fetched_on_the_way_where_a_model_keeps_windows_or_states(split):
    followed = Followed(split, row(70))
    _, ticket = followed.complete()
    arrival = followed.arrive(ticket)
    assert 0 < arrival.num_early < len(ticket.pages)
    split.decode.pool.free(arrival.pages)
    followed.settle(ticket)


@pytest.mark.parametrize("split", ["llama", "gemma3_text", "qwen3_next"], indirect=True)
def test_a_prompt_that_lost_its_pages_on_the_way_is_offered_anew_and_the_answer_is_the_same(split):
    prompt = row(70)
    alone = list(split.decode.generate([prompt], PARAMS)[0].tokens)
    followed = Followed(split, prompt)
    for _ in range(3):
        followed.step()
    (sequence,) = split.prefill._running
    split.prefill._preempt(sequence, offload=False)
    # Whoever got the pages wrote into them.
    pool = split.prefill.pool
    taken = pool.alloc(pool.num_free)
    pool.storage_PB[taken] = 7
    pool.free(taken)
    first, ticket = followed.complete()
    assert len({offer.ticket_id for offer in followed.offers}) == 2
    assert followed.offers[-1].ticket_id == ticket.ticket_id
    arrival = followed.arrive(ticket)
    assert split.finish(prompt, PARAMS, first, arrival.pages) == alone
    followed.settle(ticket)


@pytest.mark.parametrize("split", ["llama"], indirect=True)
def test_a_beginning_found_in_the_cache_is_offered_with_the_first_part(split):
    prompt = row(70)
    split.prefill.generate([prompt[:40]], PARAMS)
    followed = Followed(split, prompt)
    first, ticket = followed.complete()
    assert len(followed.offers[0].pages) > 40 // split.prefill.pool.layout.page_tokens
    arrival = followed.arrive(ticket)
    alone = list(split.decode.generate([prompt], PARAMS)[0].tokens)
    assert split.finish(prompt, PARAMS, first, arrival.pages) == alone
    followed.settle(ticket)
