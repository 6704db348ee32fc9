"""Requests with different adapters and with none share a batch; each gets what peft gives it alone."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
from tests.support.double import DoublePrecision
from tests.support.zoo import VOCAB, zoo_model
from tests.unit.engine.adapted import (
    PROMPT_SEEDS,
    TARGETS,
    ask,
    assert_greedy,
    base_of,
    logits_of,
    opened,
    rows,
    save,
    save_three,
    three_adapters,
)
from tests.unit.engine.oracle import chunked_logits
from tests.unit.engine.tiny import engine_config

from farspan.engine.draft_model import ModelDrafter
from farspan.engine.engine import Engine
from farspan.engine.request import SamplingParams
from farspan.engine.terms import Terms
from farspan.errors import EngineError, RequestError

PATHS = {"jamba": "packed stepwise", "stablelm": "alone"}
NAMES = ["law", "poems", "", "code"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory):
    """The three adapters of an architecture, made once."""

    @functools.cache
    def make(architecture: str) -> dict[str, str]:
        with DoublePrecision():
            return save_three(tmp_path_factory.mktemp(architecture), architecture)

    return make


@pytest.mark.parametrize("architecture", TARGETS)
def test_logits_of_batches_of_three_adapters_and_none_equal_peft_for_every_chunk_size(architecture, folders):
    with DoublePrecision():
        engine = Engine(base_of(architecture), engine_config(adapters=folders(architecture)))
        assert engine.path == PATHS.get(architecture, "packed")
        prompts = rows(40, 9, 13, 11)
        models = [opened(architecture, folders(architecture).get(name)) for name in NAMES]
        wanted = [logits_of(model, prompt) for model, prompt in zip(models, prompts, strict=True)]
        base = logits_of(models[2], prompts[0])
        assert float((wanted[0] - base).norm() / base.norm()) > 0.1, "an adapter without effect"
        for chunk, most in ((1, 15), (7, 40), (16, 40)):
            cut = [prompt[:most] for prompt in prompts]
            for row, position, logits_V in chunked_logits(engine, cut, chunk, NAMES):
                error = float((logits_V - wanted[row][position]).abs().max())
                assert error <= 1e-8 * max(1.0, float(wanted[row][position].abs().max())), (chunk, row, position)
        engine.check_integrity()


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "gpt_neox", "mixtral", "jamba", "stablelm"])
def test_answers_equal_peft_also_when_sequences_are_preempted_and_computed_again(architecture, folders):
    with DoublePrecision():
        engine = Engine(base_of(architecture), engine_config(max_batch_tokens=14, adapters=folders(architecture)))
        assert_interrupted_answers(engine, architecture, folders(architecture), offload=False)


def test_answers_equal_peft_also_when_the_pages_of_preempted_sequences_wait_in_host_memory(folders):
    with DoublePrecision():
        config = engine_config(max_batch_tokens=14, adapters=folders("llama"), offload_bytes=2**20)
        assert_interrupted_answers(Engine(base_of("llama"), config), "llama", folders("llama"), offload=True)


def assert_interrupted_answers(engine: Engine, architecture: str, made: dict[str, str], *, offload: bool) -> None:
    prompts = rows(10, 23, 5, 14, seed=PROMPT_SEEDS.get(architecture, 1))
    asked = {f"r{i}": (name, prompt) for i, (name, prompt) in enumerate(zip(NAMES, prompts, strict=True))}
    answers: dict[str, list[int]] = {request_id: [] for request_id in asked}
    for request_id, (adapter, prompt) in asked.items():
        engine.add(request_id, prompt, SamplingParams(max_tokens=16), terms=Terms(adapter=adapter))
    steps = 0
    while engine.has_work:
        for event in engine.step():
            answers[event.request_id].append(event.token)
        steps += 1
        if steps in (3, 6, 11) and engine._running:
            engine._preempt(engine._running[steps % len(engine._running)], offload=offload)
        engine.check_integrity()
    for request_id, (adapter, prompt) in asked.items():
        assert len(answers[request_id]) == 16
        assert_greedy(opened(architecture, made.get(adapter)), prompt, answers[request_id])


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "qwen3_moe"])
def test_answers_equal_the_generate_of_peft(architecture, folders):
    (prompt,) = rows(19, seed=4)
    with DoublePrecision():
        engine = Engine(base_of(architecture), engine_config(adapters=folders(architecture)))
        got = ask(engine, {name or "base": (name, prompt) for name in NAMES})
        for name in NAMES:
            given = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, 19, dtype=torch.long)}
            out = opened(architecture, folders(architecture).get(name)).generate(
                **given, max_new_tokens=16, do_sample=False
            )
            assert got[name or "base"] == out[0, 19:].tolist()
    assert len({tuple(answer) for answer in got.values()}) == 4, "adapters that answer alike"


class KnowingDrafter:
    """Guesses every answer it was told, each third token wrong."""

    def __init__(self, answers: dict[str, list[int]], num_prompt: int) -> None:
        self.answers, self.num_prompt, self.asked = answers, num_prompt, 0

    def propose(self, asks):
        self.asked += len(asks)
        found = []
        for each in asks:
            done = len(each.tokens) - self.num_prompt
            rest = enumerate(self.answers[each.request_id][done : done + each.most], start=done)
            found.append([(token + 1) % 61 if place % 3 == 2 else token for place, token in rest])
        return found

    def forget(self, request_id):
        pass


def test_an_answer_goes_on_with_its_adapter_after_its_pages_were_taken_and_adopted(folders):
    (prompt,) = rows(19, seed=4)
    law, params = Terms(adapter="law"), SamplingParams(max_tokens=16)
    with DoublePrecision():
        engine = Engine(base_of("llama"), engine_config(adapters=folders("llama")))
        engine.add("prefill", prompt, params, prefill_only=True, terms=law)
        (first,) = engine.step()
        pages, num_tokens = engine.take("prefill")
        assert num_tokens == 19
        with pytest.raises(RequestError, match="no adapter 'lav' is here"):
            engine.adopt("decode", prompt, params, [first.token], pages, terms=Terms(adapter="lav"))
        engine.adopt("decode", prompt, params, [first.token], pages, terms=law)
        answer = [first.token]
        while engine.has_work:
            answer += [event.token for event in engine.step()]
        assert_greedy(opened("llama", folders("llama")["law"]), prompt, answer)
    engine.check_integrity()


def test_guessed_tokens_are_checked_with_the_adapter_of_their_request(folders):
    (prompt,) = rows(12, seed=2)
    asked = {name or "base": (name, prompt) for name in NAMES}
    with DoublePrecision():
        plain = ask(Engine(base_of("llama"), engine_config(adapters=folders("llama"))), asked)
        drafter = KnowingDrafter(plain, 12)
        config = engine_config(adapters=folders("llama"), draft_tokens=4)
        engine = Engine(base_of("llama"), config, drafter=drafter)
        steps, run = [], engine._runner.run
        engine._runner.run = lambda pieces: steps.append(len(pieces)) or run(pieces)
        assert ask(engine, asked) == plain
        assert_greedy(opened("llama", folders("llama")["law"]), prompt, plain["law"])
        # A draft model knows no adapter: it is right for the model alone, which it is, and at times for the others.
        alone = ModelDrafter(zoo_model("llama"), engine_config(), VOCAB)
        by_model = Engine(base_of("llama"), config, drafter=alone)
        assert ask(by_model, asked) == plain
        by_model.check_integrity()
    assert drafter.asked
    assert len(steps) < 16, "no guess was right"
    assert 9 <= by_model.drafted.accepted < by_model.drafted.proposed


def test_adapters_share_no_pages_and_a_request_finds_those_of_its_own(folders):
    (prompt,) = rows(37)
    with DoublePrecision():
        engine = Engine(base_of("llama"), engine_config(adapters=folders("llama")))
        computed: list[int] = []
        run = engine._runner.run
        engine._runner.run = lambda pieces: computed.append(sum(len(p.tokens) for p in pieces)) or run(pieces)
        for name, expected in (("law", 37), ("poems", 37), ("", 37), ("law", 1), ("", 1), ("poems", 1)):
            computed.clear()
            answer = ask(engine, {"r": (name, prompt)})["r"]
            assert computed[0] == expected
            assert_greedy(opened("llama", folders("llama").get(name)), prompt, answer)


def test_a_retrained_adapter_under_an_old_name_finds_nothing_of_the_old_one_and_the_same_again_finds_all(
    folders, tmp_path
):
    """Nothing tells the two apart but the numbers in their matrices."""
    (prompt,) = rows(37)
    old = folders("llama")["law"]
    new = save(tmp_path / "again", zoo_model("llama"), three_adapters("llama")["law"], seed=9)
    with DoublePrecision():
        engine = Engine(base_of("llama"), engine_config())
        computed: list[int] = []
        run = engine._runner.run
        engine._runner.run = lambda pieces: computed.append(sum(len(p.tokens) for p in pieces)) or run(pieces)
        for folder, expected in ((old, 37), (new, 37), (old, 1)):
            engine.add_adapter("mine", folder)
            computed.clear()
            answer = ask(engine, {"r": ("mine", prompt)})["r"]
            assert computed[0] == expected
            assert_greedy(opened("llama", folder), prompt, answer)
            engine.remove_adapter("mine")


def test_what_is_pinned_of_an_adapter_is_found_by_its_requests_alone(folders):
    (prompt,) = rows(32)
    engine = Engine(base_of("llama"), engine_config(adapters=folders("llama")))
    ask(engine, {"r": ("law", prompt)}, num_tokens=1)
    assert engine.pin_prefix("p", prompt, engine.adapters.scope("law")) == 32
    assert engine.pin_prefix("q", prompt, engine.adapters.scope("poems")) == 0
    assert engine.pin_prefix("q", prompt) == 0


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_request_without_an_adapter_gets_every_bit_it_gets_without_adapters_in_any_batch(architecture, folders):
    prompts = rows(20, 9, 13, 11)

    def logits(engine: Engine, adapters: list[str]) -> list[torch.Tensor]:
        found = chunked_logits(engine, prompts, 7, adapters)
        return [logits_V for row, _, logits_V in found if row == 2]

    plain = logits(Engine(zoo_model(architecture), engine_config()), [])
    engine = Engine(zoo_model(architecture), engine_config(adapters=folders(architecture)))
    for adapters in ([""] * 4, NAMES):
        assert all(torch.equal(a, b) for a, b in zip(plain, logits(engine, adapters), strict=True))
    engine.remove_adapter("law")
    assert all(torch.equal(a, b) for a, b in zip(plain, logits(engine, []), strict=True))


def test_adapters_that_do_not_fit_together_take_turns_and_change_no_answer(folders):
    asked = {f"r{i}": (name, prompt) for i, (name, prompt) in enumerate(zip(NAMES, rows(10, 23, 5, 14), strict=True))}
    with DoublePrecision():
        roomy = Engine(base_of("llama"), engine_config(adapters=folders("llama")))
        sizes = {name: roomy.adapters._files[name].num_bytes for name in roomy.adapters.names}
        wanted = ask(roomy, asked)
        assert roomy.adapters.device_bytes == sum(sizes.values())
        narrow = Engine(base_of("llama"), engine_config(adapters=folders("llama"), adapter_bytes=max(sizes.values())))
        forwards, run = [], narrow.adapters._path.runner.run

        def watch(pieces):
            assert narrow.adapters.device_bytes == sum(
                pair.num_bytes for pairs in narrow.adapters._path.lowrank.pairs.values() for pair in pairs.values()
            )
            assert narrow.adapters.device_bytes <= max(sizes.values()) < sum(sizes.values())
            forwards.append({piece.adapter for piece in pieces})
            return run(pieces)

        narrow.adapters._path.runner.run = watch
        assert ask(narrow, asked) == wanted
    assert {"law", ""} in forwards or {""} in forwards
    assert not any({"law", "poems"} <= names or {"law", "code"} <= names for names in forwards)


def test_an_adapter_used_long_ago_leaves_the_device_first(folders):
    (prompt,) = rows(5)
    engine = Engine(base_of("llama"), engine_config(adapters=folders("llama")))
    sizes = {name: engine.adapters._files[name].num_bytes for name in NAMES if name}
    engine.adapters._most_bytes = sizes["law"] + max(sizes["poems"], sizes["code"])
    for name, there in (
        ("law", ["law"]),
        ("poems", ["law", "poems"]),
        ("law", ["poems", "law"]),
        ("code", ["law", "code"]),
        ("poems", ["code", "poems"]),
    ):
        ask(engine, {"r": (name, prompt)}, num_tokens=1)
        assert list(engine.adapters._loaded) == there


def test_an_adapter_comes_and_goes_while_others_are_used(folders):
    first, second = rows(9, 12)
    model = zoo_model("llama")
    with DoublePrecision():
        engine = Engine(model, engine_config(adapters={"law": folders("llama")["law"]}))
        engine.add("a", first, SamplingParams(max_tokens=16), terms=Terms(adapter="law"))
        tokens = [event.token for _ in range(4) for event in engine.step()]
        engine.add_adapter("code", folders("llama")["code"])
        with pytest.raises(EngineError, match=r"adapter 'law' is used by 1 requests \(a\); wait for or cancel them"):
            engine.remove_adapter("law")
        engine.add("b", second, SamplingParams(max_tokens=16), terms=Terms(adapter="code"))
        late: list[int] = []
        while engine.has_work:
            for event in engine.step():
                (tokens if event.request_id == "a" else late).append(event.token)
        assert_greedy(opened("llama", folders("llama")["law"]), first, tokens)
        assert_greedy(opened("llama", folders("llama")["code"]), second, late)
        engine.remove_adapter("law")
        assert engine.adapters.names == ["code"]
        assert set(engine.adapters._path.lowrank.pairs) == {"code"}
        ask(engine, {"b": ("code", second)})
        engine.remove_adapter("code")
    assert not any(module._forward_hooks for module in model.modules())


def test_an_engine_that_is_gone_leaves_nothing_at_the_layers_of_its_model(folders):
    model = zoo_model("llama")
    engine = Engine(model, engine_config(adapters=folders("llama")))
    assert any(module._forward_hooks for module in model.modules())
    del engine
    gc.collect()
    assert not any(module._forward_hooks for module in model.modules())


def test_an_unknown_adapter_fails_its_request_alone_and_the_known_ones_are_named(folders):
    engine = Engine(base_of("llama"), engine_config(adapters=folders("llama")))
    first, second = rows(5, 6)
    engine.add("a", first, SamplingParams(max_tokens=2), terms=Terms(adapter="law"))
    with pytest.raises(RequestError, match="no adapter 'lav' is here; known: code, law, poems"):
        engine.add("b", second, SamplingParams(max_tokens=2), terms=Terms(adapter="lav"))
    with pytest.raises(RequestError, match="no adapter 'law' is here; this engine has none"):
        Engine(base_of("llama"), engine_config()).add("a", first, SamplingParams(), terms=Terms(adapter="law"))
    with pytest.raises(EngineError, match="known: code, law, poems"):
        engine.remove_adapter("lav")
    assert len([event for _ in range(2) for event in engine.step()]) == 2
    assert not engine.has_work
