"""Decode one step ahead of what was looked at gives the same answers, and no page to two owners.

Without a GPU a graph is the same step run again: what is launched ahead is computed at once, and looked at later.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from tests.unit.engine.again import rerun
from tests.unit.engine.tiny import VOCAB, engine_config, prompts, reference, tiny_model
from tests.unit.engine.worded import worded_model
from transformers import PreTrainedModel

from farspan.engine.engine import Engine
from farspan.engine.request import Completion, Event, FailedEvent, SamplingParams
from farspan.engine.runner import Runner
from farspan.engine.terms import Terms

CONTEXT = 90


def engine_of(model: PreTrainedModel, *, ahead: bool | None, tokenizer: object = None, **settings: object) -> Engine:
    """`ahead` none: kernel by kernel."""
    config = engine_config(**{"max_sequences": 6, "max_context_tokens": CONTEXT, **settings})
    engine = Engine(model, config, ahead=ahead, tokenizer=tokenizer)
    if ahead is not None:
        assert isinstance(engine._runner, Runner)
        engine._runner.capture(6, CONTEXT, rerun)
    return engine


@dataclass
class Asked:
    arrival: int
    prompt: list[int]
    params: SamplingParams
    priority: int = 0
    cancel_after: int | None = None
    """Tokens of its answer."""


@dataclass
class Told:
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None


def schedule(seed: int) -> list[Asked]:
    chance = random.Random(seed)
    asked = []
    for number, prompt in enumerate(prompts(*(chance.randint(1, 30) for _ in range(14)), seed=seed + 1)):
        kinds: list[dict[str, object]] = [
            {},
            {"temperature": 1.0},
            {"temperature": 0.8, "top_k": 9},
            {"temperature": 0.9, "top_p": 0.8},
            {"temperature": 1.1, "min_p": 0.05},
            {"temperature": 1.0, "min_tokens": 3},
            # Not plain: the whole batch is then looked at step by step.
            {"presence_penalty": 0.5} if seed % 3 == 0 else {},
        ]
        stops = frozenset(chance.sample(range(VOCAB), 6 if chance.random() < 0.6 else 0))
        params = SamplingParams(
            max_tokens=chance.randint(3, 30), seed=seed, request=number, stop_token_ids=stops, **chance.choice(kinds)
        )
        cancel = chance.randint(1, 8) if chance.random() < 0.25 else None
        asked.append(
            Asked(chance.choice([0, 0, chance.randint(0, 40)]), prompt, params, chance.choice([0, 0, 1]), cancel)
        )
    return asked


def play(engine: Engine, asked: list[Asked]) -> tuple[dict[str, Told], int]:
    """What everybody got, and how many steps ended with another one on its way. Pages are counted after each step."""
    told = {f"r{number}": Told() for number in range(len(asked))}
    later, step, num_ahead = set(told), 0, 0
    while later or engine.has_work:
        for name in sorted(later):
            one = asked[int(name[1:])]
            if one.arrival <= step:
                later.remove(name)
                engine.add(name, one.prompt, one.params, terms=Terms(priority=one.priority))
        for event in engine.step():
            take(told, event)
        for name, got in told.items():
            most = asked[int(name[1:])].cancel_after
            if most is not None and len(got.tokens) >= most and got.finish is None:
                assert engine.cancel(name)
                got.finish = "cancelled"
        engine.check_integrity()
        num_ahead += any(True for _ in engine._steady.owned()) if engine._steady is not None else 0
        step += 1
    engine.check_integrity()
    assert engine.pool.num_free == engine.pool.num_pages
    return told, num_ahead


def take(told: dict[str, Told], event: Event) -> None:
    assert not isinstance(event, FailedEvent)
    got = told[event.request_id]
    assert got.finish is None, "a token after the end"
    got.tokens.append(event.token)
    got.finish = event.finish


@pytest.mark.parametrize("settings", [{}, {"kv_bytes": 60_000}, {"prefix_cache": False}], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_random_schedules_are_answered_alike_with_and_without_running_ahead(seed, settings) -> None:
    model, asked = tiny_model(), schedule(seed)
    plain, _ = play(engine_of(model, ahead=None, **settings), asked)
    steady, none = play(engine_of(model, ahead=False, **settings), asked)
    early, num_ahead = play(engine_of(model, ahead=True, **settings), asked)
    assert none == 0
    assert num_ahead >= 1
    for name, want in plain.items():
        for got in (steady[name], early[name]):
            if want.finish == "cancelled":
                # A step may tell of two tokens: whoever cancels comes later by one.
                count = min(len(want.tokens), len(got.tokens))
                assert got.tokens[:count] == want.tokens[:count]
            else:
                assert got == want
    assert {got.finish for got in plain.values()} >= {"stop", "length"}


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_long_answers_ahead_are_those_of_transformers(architecture) -> None:
    """Rows cross from page to page at different steps, also where windows give pages back."""
    model = tiny_model(architecture, **({"sliding_window": 7} if architecture == "mistral" else {}))
    asked = prompts(5, 17, 33, 2, 9)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    engine = engine_of(model, ahead=True)
    answers = engine.generate(asked, params)
    assert engine.pool.num_free == engine.pool.num_pages
    engine.check_integrity()
    assert [list(answer.tokens) for answer in answers] == [reference(model, prompt, 40) for prompt in asked]


def test_what_a_step_on_its_way_writes_is_held_until_it_is_over() -> None:
    model = tiny_model()
    first, second = prompts(9, 12)
    wanted = reference(model, first, 12)
    # The first of its tokens that was not there before, late enough to be decoded ahead.
    last = next(i for i in range(4, 12) if wanted[i] not in wanted[:i])
    engine = engine_of(model, ahead=True, prefix_cache=False)
    engine.add("ends", first, SamplingParams(max_tokens=30, stop_token_ids=frozenset({wanted[last]})))
    engine.add("goes on", second, SamplingParams(max_tokens=30))
    finish = None
    while finish is None:
        pages = list(next(s.pages for s in engine._running or engine._waiting if s.request_id == "ends"))
        finish = next((e.finish for e in engine.step() if e.request_id == "ends"), None)  # type: ignore[union-attr]
    assert finish == "stop"
    (owned,) = engine._steady.owned()  # type: ignore[union-attr]
    written = [page for page in owned.pages if page in pages or engine.pool.holders(page) == 1]
    assert len(written) == 1, "the last page of the one that ended"
    assert engine.pool.holders(written[0]) == 1
    engine.check_integrity()
    engine.step()
    assert written[0] not in [page for s in engine._running for page in s.pages]
    engine.cancel("goes on")
    assert engine.pool.num_free == engine.pool.num_pages


def test_cancelling_everybody_leaves_nothing_on_its_way() -> None:
    engine = engine_of(tiny_model(), ahead=True)
    for number, prompt in enumerate(prompts(5, 9, 14)):
        engine.add(f"r{number}", prompt, SamplingParams(max_tokens=50))
    for _ in range(6):
        engine.step()
    assert list(engine._steady.owned())  # type: ignore[union-attr]
    for number in range(3):
        assert engine.cancel(f"r{number}")
    assert not engine.has_work
    assert engine.pool.num_free == engine.pool.num_pages
    engine.check_integrity()


def test_a_stop_string_ends_an_answer_that_is_decoded_ahead(tmp_path: Path) -> None:
    model, tokenizer = worded_model(tmp_path)
    (prompt,) = prompts(9)
    params = SamplingParams(max_tokens=24, ignore_eos=True)

    def answer(ahead: bool | None, params: SamplingParams) -> Completion:
        engine = engine_of(model, ahead=ahead, tokenizer=tokenizer)
        (found,) = engine.generate([prompt], params)
        assert engine.pool.num_free == engine.pool.num_pages
        return found

    text = tokenizer.decode(answer(None, params).tokens[6:10])
    stopped = [answer(ahead, replace(params, stop=(text[-2:],))) for ahead in (None, False, True)]
    assert stopped[0] == stopped[1] == stopped[2]
    assert stopped[0].finish == "stop"


def test_a_weight_that_is_exchanged_while_a_step_is_on_its_way_counts_from_the_next_token_on() -> None:
    answers = []
    for ahead in (None, True):
        model = tiny_model()
        engine = engine_of(model, ahead=ahead)
        engine.add("r", prompts(9)[0], SamplingParams(max_tokens=20))
        tokens: list[int] = []
        while len(tokens) < 20:
            tokens += [event.token for event in engine.step()]  # type: ignore[union-attr]
            # One more token was launched with the old weights where steps are ahead.
            if len(tokens) == (8 if ahead is None else 7):
                head = model.get_output_embeddings()
                head.weight = torch.nn.Parameter(-head.weight.detach())
        assert engine.pool.num_free == engine.pool.num_pages
        answers.append(tokens)
    assert answers[0] == answers[1]
