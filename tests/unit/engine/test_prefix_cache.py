"""A prompt that begins like an earlier one is computed from where they part, and answered the same."""

from __future__ import annotations

import random

import pytest
import torch
from tests.unit.engine.ledger import Clock, answer, ledger_engine
from tests.unit.engine.tiny import ARCHITECTURES, VOCAB, engine_config, prompts, reference, tiny_model

from farspan.engine.engine import Engine
from farspan.engine.probe import plain_logits
from farspan.engine.request import FailedEvent, SamplingParams
from farspan.engine.terms import Terms
from farspan.errors import RequestError
from farspan.kv.prefix import PrefixScope


class Watched:
    """An engine that remembers how many tokens it ran, and the last logits of every request."""

    def __init__(self, model, **settings):
        self.engine = Engine(model, engine_config(**settings))
        self.num_tokens, self.logits = 0, []
        run = self.engine._runner.run

        def watch(pieces):
            self.num_tokens += sum(len(piece.tokens) for piece in pieces)
            self.logits.append(run(pieces))
            return self.logits[-1]

        self.engine._runner.run = watch

    def answer(self, prompt, num_tokens=12):
        """(tokens, logits of the first of them, tokens computed before it)."""
        self.num_tokens, self.logits = 0, []
        done = self.engine.generate([prompt], SamplingParams(max_tokens=num_tokens))[0]
        return list(done.tokens), self.logits[-num_tokens][0], self.num_tokens - (num_tokens - 1)


@pytest.mark.parametrize("shared", [3, 4, 19, 32])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_hit_gives_the_tokens_and_logits_of_a_miss_and_computes_only_the_rest(architecture, shared):
    model = tiny_model(architecture)
    first, second = prompts(41, 37)
    second = first[:shared] + second[shared:]
    assert second[shared] != first[shared]
    expected = reference(model, second, 12)
    cold, warm = Watched(model, prefix_cache=False), Watched(model)
    warm.answer(first)
    missed, hit = cold.answer(second), warm.answer(second)
    assert missed[0] == hit[0] == expected
    assert float((missed[1] - hit[1]).abs().max()) <= 1e-10
    assert float((hit[1] - plain_logits(model, torch.tensor(second))[-1]).abs().max()) <= 1e-8
    assert (missed[2], hit[2]) == (37, 37 - shared)
    warm.engine.check_integrity()


@pytest.mark.parametrize("length", [5, 16, 30])
def test_a_prompt_that_was_answered_before_is_computed_from_its_last_token(length):
    model = tiny_model()
    (prompt,) = prompts(length)
    warm = Watched(model)
    first = warm.answer(prompt)
    again = warm.answer(prompt)
    assert again[0] == first[0] == reference(model, prompt, 12)
    assert (first[2], again[2]) == (length, 1)


def test_the_next_turn_of_a_talk_finds_the_whole_last_one():
    model = tiny_model()
    (prompt,) = prompts(21)
    warm = Watched(model)
    tokens = warm.answer(prompt)[0]
    # The last token was chosen, but never computed.
    turn = [*prompt, *tokens, 7, 7, 9]
    answered = warm.answer(turn)
    assert answered[2] == 4
    assert answered[0] == reference(model, turn, 12)


def test_requests_that_come_together_compute_what_they_share_once():
    engine, ledger = ledger_engine(200, max_batch_tokens=64, max_sequences=16)
    chance = random.Random(1)
    shared = [chance.randrange(VOCAB) for _ in range(50)]
    asked = [[*shared, index] for index in range(8)]
    answers = engine.generate(asked, SamplingParams(max_tokens=5))
    assert [list(done.tokens) for done in answers] == [answer(prompt, 5) for prompt in asked]
    # The shared 50 once, and of each the token of its own and 4 of the answer.
    assert ledger.num_tokens == 50 + 8 * (1 + 4)


def test_several_answers_to_one_prompt_share_its_pages_and_write_into_none_of_them():
    engine, ledger = ledger_engine(200, max_batch_tokens=64, max_sequences=16)
    asked = [[5, 6, 7, 8, 9, 10] for _ in range(6)]
    for index, prompt in enumerate(asked):
        engine.add(f"r{index}", prompt, SamplingParams(max_tokens=9))
    held = []
    while engine.has_work:
        engine.step()
        held.append(engine.pool.num_held)
    # The first page is one; of the second, half filled by the prompt, everybody has a copy.
    assert max(held) <= 1 + 6 * 3
    assert ledger.num_tokens == 6 + 5 + 6 * 8


def test_tenants_with_salts_of_their_own_find_nothing_of_each_other():
    engine, ledger = ledger_engine(100)
    prompt = list(range(20))
    for salt, computed in (("a", 20), ("b", 20), ("a", 1)):
        before = ledger.num_tokens
        engine.add("r", prompt, SamplingParams(max_tokens=1), terms=Terms(scope=PrefixScope(salt=salt)))
        while engine.has_work:
            engine.step()
        assert ledger.num_tokens - before == computed
    for other in (PrefixScope(adapter="x"), PrefixScope(positions="other")):
        before = ledger.num_tokens
        engine.add("r", prompt, SamplingParams(max_tokens=1), terms=Terms(scope=other))
        engine.step()
        assert ledger.num_tokens - before == 20


def test_a_request_that_wants_its_whole_prompt_computed_gets_it_and_others_find_it():
    engine, ledger = ledger_engine(100)
    prompt = list(range(20))
    for finds, computed in ((False, 20), (False, 20), (True, 1)):
        before = ledger.num_tokens
        engine.add("r", prompt, SamplingParams(max_tokens=1), terms=Terms(finds=finds))
        while engine.has_work:
            engine.step()
        assert ledger.num_tokens - before == computed


def test_a_prompt_that_fills_the_whole_pool_takes_over_the_page_it_goes_on_from():
    engine, ledger = ledger_engine(12)
    prompt = list(range(46))
    for computed in (46, 1):
        before = ledger.num_tokens
        (done,) = engine.generate([prompt], SamplingParams(max_tokens=3))
        assert list(done.tokens) == answer(prompt, 3)
        assert ledger.num_tokens - before == computed + 2
        engine.check_integrity()


def test_the_page_unused_for_longest_is_given_away_first_and_a_pinned_one_never():
    engine, ledger = ledger_engine(12)
    talks = [list(range(start, start + 9)) for start in (0, 20, 40)]

    def computed(prompt):
        before = ledger.num_tokens
        engine.generate([prompt], SamplingParams(max_tokens=1))
        return ledger.num_tokens - before

    assert [computed(talk) for talk in talks] == [9, 9, 9]
    assert computed(talks[0]) == 1, "used again: now the second is the oldest"
    assert engine.pin_prefix("third", talks[2]) == 8
    computed(list(range(60, 78)))
    assert [computed(talks[0]), computed(talks[2])] == [1, 1]
    assert computed(talks[1]) > 1
    engine.generate([list(range(30, 66))], SamplingParams(max_tokens=1))
    assert computed(talks[2]) == 1
    with pytest.raises(RequestError, match=r"41 tokens of KV in 11 pages, engine\.kv_bytes holds 10"):
        engine.add("too long", list(range(41)), SamplingParams(max_tokens=1))
    engine.unpin_prefix("third")
    engine.generate([list(range(48))], SamplingParams(max_tokens=1))
    assert computed(talks[2]) == 9
    engine.check_integrity()


def test_keys_that_made_logits_unsound_are_found_by_nobody():
    engine, ledger = ledger_engine(50, max_batch_tokens=8)
    run = ledger.run

    def broken(pieces):
        return run(pieces) * float("nan")

    prompt = list(range(20))
    ledger.run = broken  # type: ignore[method-assign]
    engine.add("r", prompt, SamplingParams(max_tokens=2))
    (event,) = engine.step()
    assert isinstance(event, FailedEvent)
    ledger.run = run  # type: ignore[method-assign]
    before = ledger.num_tokens
    assert list(engine.generate([prompt], SamplingParams(max_tokens=1))[0].tokens) == answer(prompt, 1)
    assert ledger.num_tokens - before == 20


def test_a_request_past_its_deadline_fails_alone_and_says_so():
    clock = Clock()
    engine, _ = ledger_engine(50, clock)
    engine.add("late", [1, 2, 3], SamplingParams(max_tokens=30), terms=Terms(deadline_s=5.0))
    engine.add("calm", [4, 5, 6], SamplingParams(max_tokens=6), terms=Terms(deadline_s=500.0))
    tokens = []
    for _ in range(8):
        clock.now_s += 1.0
        events = engine.step()
        tokens += [event.token for event in events if event.request_id == "calm"]
        if failed := [event for event in events if isinstance(event, FailedEvent)]:
            assert clock.now_s == pytest.approx(5.0, abs=0.1)
            assert "deadline passed after 4 of at most 30 tokens" in str(failed[0].error)
    assert tokens == answer([4, 5, 6], 6)
    assert not engine.has_work


@pytest.mark.parametrize("page_tokens", [4, 16])
def test_kv_held_is_at_most_4_percent_more_than_kv_needed_at_steady_state(page_tokens):
    """Prompts and answers as chats have them: a long tail around a few hundred tokens."""
    chance = random.Random(3)
    engine, _ = ledger_engine(
        12_000 // page_tokens, page_tokens=page_tokens, max_batch_tokens=512, max_sequences=1000, max_context_tokens=512
    )
    held = needed = arrived = 0
    for step in range(700):
        while len(engine._waiting) < 4:
            length = min(int(chance.lognormvariate(5.6, 0.5)) + 1, 450)
            params = SamplingParams(max_tokens=min(int(chance.lognormvariate(4.5, 0.6)) + 1, 511 - length))
            engine.add(f"r{arrived}", [chance.randrange(VOCAB) for _ in range(length)], params)
            arrived += 1
        engine.step()
        assert engine.pool.num_held <= engine.pool.num_pages
        if step > 200:
            held += engine.pool.num_held * page_tokens
            needed += sum(sequence.num_computed for sequence in engine._running)
    assert needed / 500 > 0.85 * 12_000, "the pool was not full enough to prove anything"
    assert held / needed <= 1.04
    assert engine.pool.storage_PB.nbytes <= 12_000 // page_tokens * engine.pool.layout.page_bytes
