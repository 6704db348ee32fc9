"""What left the pool comes back from host memory, is checked, and changes no answer."""

from __future__ import annotations

import random

import pytest
import torch
from tests.support.double import DoublePrecision
from tests.unit.engine.ledger import answer, ledger_engine
from tests.unit.engine.tiny import VOCAB, engine_config, prompts, tiny_model

from farspan.engine.engine import Engine
from farspan.engine.request import SamplingParams
from farspan.engine.terms import Terms
from farspan.errors import ConfigError, TierError
from farspan.kv.host_cache import HostCache
from farspan.kv.prefix import PrefixScope

MIB = 1 << 20


def settled(engine: Engine) -> Engine:
    """Everything that is to be kept is kept."""
    assert engine.host is not None
    assert engine.host.flush(60)
    return engine


def ask(engine: Engine, prompt: list[int], num_tokens: int = 3, **terms: object) -> tuple[list[int], list[float], int]:
    """(tokens, log-probabilities, tokens of the prompt that were found) of one request."""
    params = SamplingParams(max_tokens=num_tokens, logprobs=1)
    engine.add("r", prompt, params, terms=Terms(**terms))  # type: ignore[arg-type]
    events = []
    while engine.has_work:
        events += engine.step()
    settled(engine)
    engine.check_integrity()
    return [e.token for e in events], [e.logprobs.logprob for e in events if e.logprobs], events[0].num_found


def flood(engine: Engine, seed: int = 99) -> None:
    """Other prompts, until every page of the pool was given to one of them."""
    chance = random.Random(seed)
    epochs = engine.pool.epochs_P.clone()
    while not bool((engine.pool.epochs_P > epochs).all()):
        ask(engine, [chance.randrange(VOCAB) for _ in range(min(60, 2 * engine.pool.num_pages))], 1)


def flip_a_bit(engine: Engine, chance: random.Random) -> None:
    """In every block of the host's memory."""
    memory_SB = engine.host._link._cache._tier._memory_SB
    for slot in range(len(memory_SB)):
        memory_SB[slot, chance.randrange(memory_SB.shape[1])] ^= 1 << chance.randrange(8)


@pytest.mark.parametrize("length", [41, 48])
def test_a_beginning_that_left_the_pool_comes_back_with_the_same_tokens_and_log_probabilities(length):
    model = tiny_model()
    (prompt,) = prompts(length)
    page_bytes = Engine(model, engine_config()).pool.layout.page_bytes
    plain = Engine(model, engine_config(prefix_cache=False))
    params = SamplingParams(max_tokens=12, logprobs=1)
    (wanted,) = plain.generate([prompt], params)
    engine = Engine(model, engine_config(kv_bytes=20 * page_bytes, host_cache_bytes=4 * MIB))
    first = ask(engine, prompt, 12)
    flood(engine)
    again = ask(engine, prompt, 12)
    assert (first[2], again[2]) == (0, (length - 1) // 4 * 4)
    assert first[0] == again[0] == list(wanted.tokens)
    assert len(set(first[0])) >= 6
    # The tokens after the beginning are computed in another batch than before.
    assert again[1] == pytest.approx([one.logprob for one in wanted.logprobs], abs=1e-9)
    counts = engine.host.counts()
    assert counts is not None
    assert (counts.corrupt, counts.lent) == (0, (length - 1) // 4)


def test_without_host_memory_nothing_comes_back():
    engine, _ = ledger_engine(12)
    assert engine.host is None
    prompt = list(range(40))
    assert list(engine.generate([prompt], SamplingParams(max_tokens=3))[0].tokens) == answer(prompt, 3)
    engine.generate([[5] * 45], SamplingParams(max_tokens=1))
    engine.add("r", prompt, SamplingParams(max_tokens=1))
    assert engine.step()[0].num_found == 0


def test_a_flipped_bit_is_noticed_the_block_dropped_and_counted_and_the_answer_is_the_same():
    engine, _ = ledger_engine(20, host_cache_bytes=MIB)
    prompt = list(range(50))
    chance = random.Random(3)
    for turn in range(5):
        flood(engine, turn)
        assert ask(engine, prompt)[2] == (48 if turn else 0)
        flood(engine, turn)
        before = engine.host.counts().corrupt
        flip_a_bit(engine, chance)
        tokens, _, found = ask(engine, prompt)
        assert (tokens, found) == (answer(prompt, 3), 0)
        assert engine.host.counts().corrupt - before == 12
    # What was computed again is kept again.
    flood(engine, 77)
    assert ask(engine, prompt)[2] == 48


def test_one_flipped_bit_costs_only_what_comes_after_it():
    engine, _ = ledger_engine(20, host_cache_bytes=MIB)
    prompt = list(range(50))
    ask(engine, prompt)
    flood(engine)
    cache = engine.host._link._cache
    chain = engine.host._prefix.chain(PrefixScope())
    chain.name(11, prompt)
    (loan,) = cache._arbiter.lend([chain.block(5, 0).name])
    cache._tier._memory_SB[loan.slot, 17] ^= 4
    cache._arbiter.settle([loan])
    assert ask(engine, prompt)[::2] == (answer(prompt, 3), 5 * 4)
    assert engine.host.counts().corrupt == 1


def test_host_memory_holds_no_more_than_it_was_given_and_gives_the_oldest_away():
    engine, _ = ledger_engine(20, host_cache_bytes=24 * 1024)
    num_slots = engine.host.counts().num_slots
    assert num_slots * engine.pool.layout.page_bytes <= 24 * 1024
    prompt = list(range(33))
    assert ask(engine, prompt)[2] == 0
    for seed in range(6):
        flood(engine, seed)
        counts = engine.host.counts()
        assert counts.num_ready <= num_slots
    assert counts.given_away > num_slots
    assert ask(engine, prompt)[::2] == (answer(prompt, 3), 0)


def test_tenants_with_salts_of_their_own_find_nothing_of_each_other_in_host_memory():
    engine, _ = ledger_engine(20, host_cache_bytes=MIB)
    prompt = list(range(41))
    ask(engine, prompt, scope=PrefixScope(salt="a"))
    flood(engine)
    assert ask(engine, prompt, scope=PrefixScope(salt="b"))[2] == 0
    assert ask(engine, prompt)[2] == 0
    flood(engine)
    assert ask(engine, prompt, scope=PrefixScope(salt="a"))[2] == 40


def test_requests_that_wait_for_the_same_pages_fetch_them_once():
    engine, ledger = ledger_engine(60, host_cache_bytes=MIB, max_batch_tokens=32)
    prompt = list(range(41))
    ask(engine, prompt)
    flood(engine)
    lent, computed = engine.host.counts().lent, ledger.num_tokens
    asked = [[*prompt, number, 1, 2] for number in range(6)]
    answers = engine.generate(asked, SamplingParams(max_tokens=3))
    assert [list(done.tokens) for done in answers] == [answer(each, 3) for each in asked]
    settled(engine)
    assert engine.host.counts().lent - lent == 10
    # Of each, what comes after the 40 tokens that came back, and 2 of the answer.
    assert ledger.num_tokens - computed <= 6 * (4 + 2)


@pytest.mark.parametrize("window", [None, 9])
def test_random_requests_with_little_of_both_memories_are_answered_right_and_lose_no_page(window):
    chance = random.Random(8)
    engine, _ = ledger_engine(
        90 if window else 30, window=window, host_cache_bytes=64 * 1024, max_batch_tokens=24, max_sequences=4
    )
    trunks = [[chance.randrange(VOCAB) for _ in range(40)] for _ in range(8)]
    asked: dict[str, list[int]] = {}
    told: dict[str, list[int]] = {}
    found = 0
    for turn in range(600):
        if len(asked) - len([name for name in told if len(told[name]) == 4]) < 8:
            trunk = chance.choice(trunks)[: chance.randint(4, 40)]
            prompt = [*trunk, *(chance.randrange(VOCAB) for _ in range(chance.randint(1, 20)))]
            asked[f"r{turn}"] = prompt
            engine.add(f"r{turn}", prompt, SamplingParams(max_tokens=4))
        if chance.random() < 0.05 and engine._waiting:
            gone = engine._waiting[0].request_id
            engine.cancel(gone)
            del asked[gone]
            told.pop(gone, None)
        for event in engine.step():
            told.setdefault(event.request_id, []).append(event.token)
            found += event.num_found if len(told[event.request_id]) == 1 else 0
        engine.check_integrity()
    while engine.has_work:
        for event in engine.step():
            told.setdefault(event.request_id, []).append(event.token)
    assert told == {name: answer(prompt, 4) for name, prompt in asked.items()}
    settled(engine)
    engine.check_integrity()
    assert engine.pool.num_free == engine.pool.num_pages
    counts = engine.host.counts()
    assert len(asked) > 80
    # How many depends on how soon copies are done, which a busy machine decides.
    assert counts.lent > 10
    assert counts.corrupt == 0
    assert found > 1000


@pytest.mark.parametrize("shared", [8, 24, 39])
def test_of_windows_only_what_makes_a_beginning_whole_comes_back_and_the_answer_is_the_same(shared):
    engine, _ = ledger_engine(120, window=9, host_cache_bytes=MIB, max_batch_tokens=16)
    first, second = prompts(45, 43)
    second = first[:shared] + second[shared:]
    ask(engine, first)
    flood(engine)
    lent = engine.host.counts().lent
    tokens, _, found = ask(engine, second)
    assert tokens == answer(second, 3)
    assert found == shared // 4 * 4
    # One group keeps everything; of the other only the window comes back.
    groups = engine.pool.layout.num_groups
    assert 0 < engine.host.counts().lent - lent < groups * (shared // 4) + (shared < 12)


def test_a_cache_that_is_lost_is_said_once_and_everything_is_computed(caplog):
    class Lost(HostCache):
        """Answers until it is told not to."""

        gone = False

        def _fetch(self, names, targets):
            if self.gone:
                raise TierError("host cache", "the agent is lost")
            return super()._fetch(names, targets)

        def _store(self, sources):
            if self.gone:
                raise TierError("host cache", "the agent is lost")
            return super()._store(sources)

    model = tiny_model()
    made: list[Lost] = []

    def open_cache(layout):
        made.append(Lost.alone(MIB, layout.page_bytes))
        return made[0]

    page_bytes = Engine(model, engine_config()).pool.layout.page_bytes
    engine = Engine(model, engine_config(kv_bytes=20 * page_bytes, host_cache_bytes=1), host_cache=open_cache)
    (prompt,) = prompts(41)
    first = ask(engine, prompt, 6)
    flood(engine)
    made[0].gone = True
    for _ in range(2):
        tokens, _, found = ask(engine, prompt, 6)
        assert tokens == first[0]
        assert found < 4, "no whole page; another prompt in the pool may begin with the same token"
        flood(engine)
    assert [record.message for record in caplog.records if "host memory" in record.message] == [
        "KV is no longer kept in host memory: memory tier host cache: the agent is lost"
    ]


def test_a_cache_that_does_not_answer_keeps_a_request_no_longer_than_its_patience():
    class Slow(HostCache):
        frozen = False

        def find(self, names):
            while self.frozen:
                torch.zeros(1)
            return super().find(names)

    model = tiny_model()
    made: list[Slow] = []

    def open_cache(layout):
        made.append(Slow.alone(MIB, layout.page_bytes))
        return made[0]

    engine = Engine(model, engine_config(host_cache_bytes=1), host_cache=open_cache)
    (prompt,) = prompts(41)
    made[0].frozen = True
    engine.add("r", prompt, SamplingParams(max_tokens=3))
    told = []
    while engine.has_work:
        told += engine.step()
    made[0].frozen = False
    assert len(told) == 3
    settled(engine)


def test_host_memory_for_a_model_that_finds_nothing_again_is_refused():
    with pytest.raises(ConfigError, match=r"engine\.host_cache_bytes.*prefix_cache=true"):
        Engine(tiny_model(), engine_config(prefix_cache=False, host_cache_bytes=MIB))


def test_host_memory_that_the_machine_does_not_have_is_refused():
    with pytest.raises(TierError, match=r"the host has \d+ left; ask for less"):
        Engine(tiny_model(), engine_config(host_cache_bytes=1 << 50))


def test_windows_of_a_real_model_come_back_with_the_same_answer():
    with DoublePrecision():
        kinds = ["sliding_attention", "sliding_attention", "full_attention"]
        model = tiny_model("gemma3_text", num_hidden_layers=3, layer_types=kinds, sliding_window=9)
        (prompt,) = prompts(45)
        layout = Engine(model, engine_config()).pool.layout
        plain = Engine(model, engine_config(prefix_cache=False))
        (wanted,) = plain.generate([prompt], SamplingParams(max_tokens=12, logprobs=1))
        engine = Engine(model, engine_config(kv_bytes=60 * layout.page_bytes, host_cache_bytes=MIB))
        ask(engine, prompt, 12)
        flood(engine)
        tokens, logprobs, found = ask(engine, prompt, 12)
        assert (tokens, found) == (list(wanted.tokens), 44)
        assert logprobs == pytest.approx([one.logprob for one in wanted.logprobs], abs=1e-8)
