"""Guesses, log-probabilities, the prefix cache and preemption on every path of a model, and all at once."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from tests.support.double import DoublePrecision
from tests.support.zoo import zoo_model
from tests.unit.engine.first_class import PATHS, WITH_STATES, kinds, model_of
from tests.unit.engine.ledger import Clock, answer, ledger_engine
from tests.unit.engine.oracle import whole_logits
from tests.unit.engine.tiny import VOCAB, engine_config, tiny_model

from farspan.engine.draft import Ask
from farspan.engine.draft_model import ModelDrafter
from farspan.engine.engine import Engine
from farspan.engine.request import Completion, SamplingParams, TokenEvent, whole_answer
from farspan.errors import ConfigError, ModelError

# One of each path, and of what a sequence may keep: everything, windows, states, states alone, neither.
CORE = ("llama", "gemma3_text", "bamba", "mamba", "stablelm")


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 60, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("architecture", CORE)
def test_on_every_path_log_probabilities_of_the_whole_prompt_equal_those_of_transformers(architecture):
    with DoublePrecision():
        model = zoo_model(architecture)
        prompts = prompts_of(22, 9)
        wanted = [whole_logits(model, prompt).log_softmax(-1) for prompt in prompts]
        engine = Engine(model, engine_config(max_batch_tokens=7))
        # Twice: what the first time computed is not found instead of computed.
        for _ in range(2):
            answers = engine.generate(prompts, SamplingParams(max_tokens=2, prompt_logprobs=0))
            for prompt, logprobs_TV, done in zip(prompts, wanted, answers, strict=True):
                assert len(done.prompt_logprobs) == len(prompt) - 1
                for at, found in enumerate(done.prompt_logprobs):
                    assert found.token == prompt[at + 1]
                    assert math.isclose(found.logprob, float(logprobs_TV[at, found.token]), abs_tol=1e-6)
    assert engine.path == PATHS[architecture]
    engine.check_integrity()


class Knowing:
    """Guesses the answers it was told, every third token replaced by another."""

    def __init__(self, prompts: list[list[int]], answers: list[Completion]) -> None:
        self.chance, self.num_right, self.num_wrong = random.Random(4), 0, 0
        self.whole = {
            f"prompt-{number}": [*prompt, *answer.tokens]
            for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        }

    def propose(self, asks: list[Ask]) -> list[list[int]]:
        return [self._one(self.whole[ask.request_id][len(ask.tokens) :][: ask.most]) for ask in asks]

    def forget(self, request_id: str) -> None:
        pass

    def _one(self, right: list[int]) -> list[int]:
        guess = [self.chance.randrange(60) if self.chance.random() < 1 / 3 else token for token in right]
        self.num_right += guess == right
        self.num_wrong += guess != right
        return guess


def answers_and_found(
    engine: Engine, prompts: list[list[int]], params: SamplingParams
) -> tuple[list[Completion], list[int]]:
    """What the engine answers, and how many tokens of each prompt it had computed before."""
    given: dict[str, list[TokenEvent]] = {}
    for number, prompt in enumerate(prompts):
        engine.add(f"prompt-{number}", prompt, replace(params, request=number))
        given[f"prompt-{number}"] = []
    while engine.has_work:
        for event in engine.step():
            assert isinstance(event, TokenEvent), event
            given[event.request_id].append(event)
    return [whole_answer(events) for events in given.values()], [events[0].num_found for events in given.values()]


@pytest.mark.parametrize("architecture", kinds(core=(*CORE, "gpt_oss", "deepseek_v3")))
def test_on_every_path_engines_that_guess_and_find_answer_like_those_that_do_not(architecture):
    prompts = prompts_of(30, 14)
    prompts.append(prompts[0][:25] + prompts[1])
    params = SamplingParams(max_tokens=24, temperature=0.7, seed=5)
    with DoublePrecision():
        model = model_of(architecture)
        plain = Engine(model, engine_config(prefix_cache=False)).generate(prompts, params)
        assert all(len(set(answer.tokens)) >= 6 for answer in plain), "a vacuous answer"
        guesser = Knowing(prompts, plain)
        engine = Engine(model, engine_config(draft_tokens=4, max_batch_tokens=16), drafter=guesser)
        assert engine.path == PATHS[architecture]
        missed, found_first = answers_and_found(engine, prompts, params)
        assert missed == plain
        assert found_first[:2] == [0, 0]
        hit, found = answers_and_found(engine, prompts, params)
        assert hit == plain
    if architecture not in WITH_STATES:
        assert [known >= len(prompt) - 4 for known, prompt in zip(found, prompts, strict=True)] == [True] * 3
        assert min(guesser.num_right, guesser.num_wrong) >= 3
    else:
        # A state cannot be set back after a wrong guess, and pages do not bring it back: neither is ever tried.
        assert (found, guesser.num_right, guesser.num_wrong) == ([0, 0, 0], 0, 0)
    engine.check_integrity()
    assert engine.pool.num_held == 0


def test_what_a_model_with_a_state_cannot_do_is_refused_by_name():
    with DoublePrecision():
        model = zoo_model("mamba")
        with pytest.raises(ConfigError, match=r"engine\.offload_bytes"):
            Engine(model, engine_config(offload_bytes=4096))
        with pytest.raises(ModelError, match="cannot be set back"):
            ModelDrafter(model, engine_config(), int(model.get_input_embeddings().num_embeddings))


def test_what_a_rejected_guess_with_nan_weights_left_in_a_page_reaches_nobody():
    model = tiny_model()
    prompt = [token for token in prompts_of(8)[0] if token != 3]
    params = SamplingParams(max_tokens=20)
    expected = Engine(model, engine_config()).generate([prompt], params)[0].tokens
    assert 3 not in expected
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = float("nan")

    class Poison:
        def propose(self, asks: list[Ask]) -> list[list[int]]:
            return [[4 if expected[len(ask.tokens) - len(prompt)] != 4 else 5, 3][: ask.most] for ask in asks]

        def forget(self, request_id: str) -> None:
            pass

    engine = Engine(model, engine_config(draft_tokens=2), drafter=Poison())
    assert engine.generate([prompt], params)[0].tokens == expected
    for known in range(1, 19):
        rest = engine.generate([[*prompt, *expected[:known]]], SamplingParams(max_tokens=1))[0].tokens
        assert rest == expected[known : known + 1]
    engine.check_integrity()


class Guesser:
    """Knows what a ledger says next, and is wrong every third time."""

    def __init__(self) -> None:
        self.chance, self.num_asked = random.Random(4), 0

    def propose(self, asks: list[Ask]) -> list[list[int]]:
        self.num_asked += len(asks)
        return [self._one(ask) for ask in asks]

    def forget(self, request_id: str) -> None:
        pass

    def _one(self, ask: Ask) -> list[int]:
        right = answer(ask.tokens, ask.most)
        return [self.chance.randrange(VOCAB) if self.chance.random() < 1 / 3 else token for token in right]


@pytest.mark.parametrize("offload_bytes", [0, 64 * 4096])
def test_wrong_guesses_leave_nothing_that_another_request_finds(offload_bytes):
    """Few pages, common beginnings, cancellations: the ledger's answer depends on every token in every page."""
    chance, guesser = random.Random(9), Guesser()
    engine, _ = ledger_engine(
        36, Clock(), max_batch_tokens=24, max_sequences=5, draft_tokens=3, offload_bytes=offload_bytes, drafter=guesser
    )
    preambles = [[chance.randrange(VOCAB) for _ in range(length)] for length in (6, 17, 31)]
    asked: dict[str, tuple[list[int], int]] = {}
    given: dict[str, list[int]] = {}
    num_finished = num_found = 0
    for number in range(3000):
        if number < 2600 and len(asked) < 20 and chance.random() < 0.2:
            prompt = [*chance.choice(preambles), *(chance.randrange(VOCAB) for _ in range(chance.randint(1, 20)))]
            asked[f"r{number}"], given[f"r{number}"] = (prompt, chance.randint(1, 40)), []
            engine.add(f"r{number}", prompt, SamplingParams(max_tokens=asked[f"r{number}"][1]))
        elif asked and chance.random() < 0.02:
            name = chance.choice(sorted(asked))
            assert engine.cancel(name)
            del asked[name]
        for event in engine.step():
            assert isinstance(event, TokenEvent), event
            given[event.request_id].append(event.token)
            if event.finish:
                assert given[event.request_id] == answer(*asked.pop(event.request_id))
                num_finished += 1
        num_found += sum(sequence.num_found for sequence in engine._running)
        engine.check_integrity()
    assert not asked
    assert engine.pool.num_free == engine.pool.num_pages
    assert num_finished > 200
    assert guesser.num_asked > 500
    assert num_found > 500
