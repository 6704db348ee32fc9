"""Prefill in one engine and decode in another equals one engine doing both, token for token."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from tests.support.double import DoublePrecision
from tests.unit.engine.first_class import kinds
from tests.unit.engine.split import NUM_TOKENS, Split
from tests.unit.engine.tiny import ARCHITECTURES, prompts, reference, tiny_model

from farspan.engine.request import SamplingParams
from farspan.errors import TransferError


@pytest.fixture
def split(request):
    made = Split(*request.param)
    yield made
    made.close()


@pytest.mark.parametrize(
    "split",
    [*((a, "memory") for a in ARCHITECTURES), ("llama", "nixl"), ("qwen3", "nixl"), ("qwen3", "object_store")],
    indirect=True,
)
@pytest.mark.parametrize("length", [1, 8, 61])
def test_prefill_here_and_decode_there_equals_both_in_one_place(split, length):
    (prompt,) = prompts(length)
    sampled = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.8, seed=5)
    for params in (SamplingParams(max_tokens=NUM_TOKENS), sampled):
        alone = list(split.decode.generate([prompt], params)[0].tokens)
        first, ticket = split.offer(prompt, params)
        assert ticket.num_tokens == length
        arrival = split.pull(ticket)
        assert arrival.pages is not None
        assert split.leases.release(ticket.ticket_id)
        assert split.finish(prompt, params, first, arrival.pages) == alone
        assert len(set(alone)) >= 6
    for engine in (split.prefill, split.decode):
        engine.check_integrity()
        assert engine.pool.num_free == engine.pool.num_pages


@pytest.mark.parametrize("split", [("llama", "memory"), ("llama", "nixl"), ("llama", "object_store")], indirect=True)
@pytest.mark.parametrize("damage", ["stale epoch", "flipped byte", "unknown page", "expired lease"])
def test_a_damaged_offer_gives_no_foreign_token_and_the_answer_is_recomputed(split, damage):
    prompt, other = prompts(30, 31)
    params = SamplingParams(max_tokens=NUM_TOKENS)
    expected = reference(tiny_model("llama"), prompt, NUM_TOKENS)
    first, ticket = split.offer(prompt, params)
    if damage == "stale epoch":
        split.leases.release(ticket.ticket_id)
        # Released pages keep their content until somebody gets them: make somebody get them.
        pool = split.prefill.pool
        pool.free(pool.alloc(pool.num_free))
        split.prefill.generate([other], params)
    elif damage == "flipped byte":
        split.prefill.pool.storage_PB[ticket.pages[3].page, 5] ^= 64
    elif damage == "unknown page":
        ticket = replace(ticket, pages=(*ticket.pages[:-1], replace(ticket.pages[-1], page=10**6)))
    else:
        ticket = replace(ticket, lease_until_s=time.time() - 1)
    if damage in ("unknown page", "expired lease"):
        pages = split.decode.pool.alloc(len(ticket.pages))
        with pytest.raises(TransferError, match=r"no page|lease has expired"):
            split.puller.start(ticket, pages, time.monotonic(), time.time())
        split.decode.pool.free(pages)
    else:
        arrival = split.pull(ticket)
        assert arrival.pages is None
        assert isinstance(arrival.error, TransferError)
    assert split.decode.pool.num_held == 0
    split.decode.add("r", prompt, params, answered=[first])
    rest = [event.token for _ in range(NUM_TOKENS - 1) for event in split.decode.step()]
    assert [first, *rest] == expected
    split.decode.check_integrity()


@pytest.mark.parametrize("architecture", kinds(("llama", "gemma3_text", "qwen3_next"), core=("llama", "qwen3_next")))
@pytest.mark.parametrize("page_tokens", [2, 8])
def test_pages_of_another_size_are_refused_before_a_byte_moves_and_the_answer_is_the_same(architecture, page_tokens):
    prompt = [token % 61 for token in prompts(37)[0]]
    params = SamplingParams(max_tokens=NUM_TOKENS, logprobs=0)
    with DoublePrecision():
        split = Split(architecture, "memory", page_tokens=page_tokens)
        split.prefill.add("early", prompt, params, prefill_only=True)
        assert not split.prefill.step()
        (name, life, growing) = next(split.prefill.growing())
        offer = split.leases.grow(name, life, growing, len(prompt), split.source.address(), time.time())
        assert not split.puller.follow(offer, 0, time.monotonic(), time.time())
        split.prefill.cancel("early")
        assert split.decode.pool.num_held == 0
        first, ticket = split.offer(prompt, params)
        pages = split.decode.pool.alloc(len(ticket.pages))
        before = split.decode.pool.storage_PB.clone()
        with pytest.raises(TransferError, match="another model or KV layout"):
            split.puller.start(ticket, pages, time.monotonic(), time.time())
        assert split.puller.poll(time.monotonic()) == []
        assert torch.equal(split.decode.pool.storage_PB, before)
        split.decode.pool.free(pages)
        split.decode.add("r", prompt, params, answered=[first])
        rest = [event for _ in range(NUM_TOKENS - 1) for event in split.decode.step()]
        (whole,) = split.prefill.generate([prompt], params)
    assert [first, *(event.token for event in rest)] == list(whole.tokens)
    assert [event.logprobs.logprob for event in rest] == pytest.approx(
        [each.logprob for each in whole.logprobs[1:]], rel=0, abs=1e-8
    )
    split.close()


@pytest.mark.parametrize("page_tokens", [2, 8])
def test_a_ticket_that_claims_pages_of_another_size_to_be_alike_brings_no_foreign_byte(page_tokens):
    """One page here and one there: nothing but its digest tells that they mean something else."""
    (prompt,) = prompts(1)
    params = SamplingParams(max_tokens=NUM_TOKENS)
    split = Split("llama", "nixl", page_tokens=page_tokens)
    first, ticket = split.offer(prompt, params)
    assert (len(ticket.pages), split.decode.pool.layout.num_travelling(1)) == (1, 1)
    arrival = split.pull(replace(ticket, layout=split.decode.pool.layout.fingerprint()))
    assert arrival.pages is None
    assert "other bytes than were offered" in str(arrival.error)
    assert split.decode.pool.num_held == 0
    split.decode.add("r", prompt, params, answered=[first])
    rest = [event.token for _ in range(NUM_TOKENS - 1) for event in split.decode.step()]
    assert [first, *rest] == reference(tiny_model("llama"), prompt, NUM_TOKENS)
    split.close()
