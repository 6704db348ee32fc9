"""What no layer will read again is given back while a sequence goes on, and nothing else is."""

from __future__ import annotations

import random

import pytest
import torch
from tests.support.double import DoublePrecision
from tests.support.zoo import VOCAB, zoo_model
from tests.unit.engine.oracle import whole_logits
from tests.unit.engine.split import Split
from tests.unit.engine.tiny import engine_config
from transformers import PreTrainedModel

from farspan.engine.engine import Engine
from farspan.engine.request import SamplingParams
from farspan.errors import RequestError

# Windows alone; windows and full attention; chunks and full attention. With 6, 6 and 8 tokens, on pages of 4.
WINDOWED = ("mistral", "gemma3_text", "gpt_oss", "llama4_text")
SETTINGS = {
    "gemma3_text": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "llama4_text": {"attn_temperature_tuning": False, "layer_types": ["chunked_attention", "full_attention"]},
}


@pytest.fixture(autouse=True)
def double_precision():
    with DoublePrecision():
        yield


def model_of(architecture: str, **settings: object) -> PreTrainedModel:
    return zoo_model(architecture, **{**SETTINGS.get(architecture, {}), **settings})


def row(length: int, seed: int = 1) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_greedy(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> None:
    choices = whole_logits(model, [*prompt, *answer])[len(prompt) - 1 : -1].argmax(1).tolist()
    assert answer == choices


def poison_free_pages(engine: Engine) -> None:
    """Whatever nobody holds is NaN: who reads it anyway gives NaN."""
    pool = engine.pool
    free = [page for page in range(pool.num_pages) if pool.holders(page) == 0]
    pool.storage_PB.view(torch.float64)[free] = float("nan")


def watch_logits(engine: Engine) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    run = engine._runner.run

    def watched(pieces):
        found.append(run(pieces))
        return found[-1]

    engine._runner.run = watched  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("architecture", WINDOWED)
def test_with_nan_in_every_page_that_was_given_back_the_logits_are_those_of_a_plain_forward(architecture):
    model = model_of(architecture)
    engine = Engine(model, engine_config(prefix_cache=False, max_batch_tokens=7))
    logits = watch_logits(engine)
    prompt = row(45)
    engine.add("r", prompt, SamplingParams(max_tokens=40))
    answer, most_held = [], 0
    while engine.has_work:
        poison_free_pages(engine)
        answer += [event.token for event in engine.step()]
        engine.check_integrity()
        most_held = max(most_held, engine.pool.num_held)
    wanted = whole_logits(model, [*prompt, *answer])
    scale = float(wanted.abs().max().clamp_min(1))
    assert float((torch.cat(logits[-40:]) - wanted[44:-1]).abs().max()) <= 1e-8 * scale
    assert answer == wanted[44:-1].argmax(1).tolist()
    assert len(set(answer)) >= 6
    layout = engine.pool.layout
    assert layout.gives_back
    assert most_held <= layout.most_pages(84, 7) < layout.num_pages(84)
    assert engine.pool.num_free == engine.pool.num_pages


def test_windows_alone_answer_prompts_of_many_times_the_tokens_that_the_pool_holds():
    model = model_of("mistral")
    layout = Engine(model_of("mistral"), engine_config()).pool.layout
    kv_bytes = 16 * layout.page_bytes
    engine = Engine(model, engine_config(kv_bytes=kv_bytes, max_batch_tokens=8))
    assert engine.pool.num_pages * 4 == 64
    prompts = {f"r{number}": row(200, seed=number) for number in range(3)}
    answers: dict[str, list[int]] = {name: [] for name in prompts}
    for name, prompt in prompts.items():
        engine.add(name, prompt, SamplingParams(max_tokens=30))
    together = 0
    while engine.has_work:
        for event in engine.step():
            answers[event.request_id].append(event.token)
        together = max(together, len(engine._running))
        engine.check_integrity()
    assert together >= 2, "a sequence is counted by its window, not by its length"
    for name, prompt in prompts.items():
        assert_greedy(model, prompt, answers[name])
        assert len(answers[name]) == 30


def test_a_full_layer_beside_windows_still_counts_every_token():
    layout = Engine(model_of("gemma3_text"), engine_config()).pool.layout
    engine = Engine(model_of("gemma3_text"), engine_config(kv_bytes=40 * layout.page_bytes, max_batch_tokens=8))
    assert layout.num_groups == 3
    with pytest.raises(RequestError, match=r"engine\.kv_bytes holds"):
        engine.add("r", row(150), SamplingParams(max_tokens=1))
    engine.add("r", row(100), SamplingParams(max_tokens=1))
    while engine.has_work:
        engine.step()


@pytest.mark.parametrize(("architecture", "page_tokens"), [("mistral", 4), ("gemma3_text", 4), ("gemma3_text", 8)])
def test_kv_held_is_at_most_4_percent_more_than_kv_needed_at_steady_state(architecture, page_tokens):
    window = 256
    settings = {"sliding_window": window, "max_position_embeddings": 2048}
    if architecture == "gemma3_text":
        settings |= {"num_hidden_layers": 6, "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2}
    model = model_of(architecture, **settings)
    engine = Engine(model, engine_config(page_tokens=page_tokens, max_batch_tokens=128, kv_bytes=16 * 1024 * 1024))
    layout = engine.pool.layout
    for number in range(4):
        engine.add(f"r{number}", row(500 + 60 * number, seed=number), SamplingParams(max_tokens=90))
    held = needed = full = 0
    while engine.has_work:
        engine.step()
        if len(engine._running) < 4 or any(len(s.tokens) - s.num_computed > 1 for s in engine._running):
            continue
        held += engine.pool.num_held * layout.page_bytes
        for sequence in engine._running:
            # What the next token reads of each layer, beside its own keys.
            for group in layout.groups:
                seen = sequence.num_computed - group.reach.first(sequence.num_computed)
                needed += seen * sum(layout.layers[layer].token_elements for layer in group.layers) * 8
            full += sequence.num_computed * sum(layer.token_elements for layer in layout.layers) * 8
    assert needed > 0
    assert needed < 0.8 * full, "windows were too wide to prove anything"
    assert held / needed <= 1.04


@pytest.mark.parametrize("architecture", WINDOWED)
@pytest.mark.parametrize("shared", [3, 8, 21, 39])
def test_a_hit_gives_the_logits_of_a_miss_and_computes_only_the_rest(architecture, shared):
    model = model_of(architecture)
    first, second = row(43, seed=1), row(40, seed=2)
    second = first[:shared] + second[shared:]
    assert second[shared] != first[shared]
    engine = Engine(model, engine_config(max_batch_tokens=16))
    engine.generate([first], SamplingParams(max_tokens=3))
    logits = watch_logits(engine)
    answer = list(engine.generate([second], SamplingParams(max_tokens=12))[0].tokens)
    wanted = whole_logits(model, [*second, *answer])[39:-1]
    assert float((torch.cat(logits[-12:]) - wanted).abs().max()) <= 1e-8 * float(wanted.abs().max().clamp_min(1))
    assert answer == wanted.argmax(1).tolist()


def test_a_window_needs_only_the_last_pages_of_a_prefix_and_without_them_nothing_is_found():
    model = model_of("mistral")
    layout = Engine(model_of("mistral"), engine_config()).pool.layout
    engine = Engine(model, engine_config(kv_bytes=24 * layout.page_bytes, max_batch_tokens=8))
    prompt = row(61)
    tokens = 0
    run = engine._runner.run

    def counted(pieces):
        nonlocal tokens
        tokens += sum(len(piece.tokens) for piece in pieces)
        return run(pieces)

    engine._runner.run = counted  # type: ignore[method-assign]
    computed = []
    # Nothing is there; then others take the oldest pages, which lie before the window; then all; then all but pinned.
    for others in (0, 24, 90, 91):
        if others == 91:
            assert engine.pin_prefix("kept", prompt) == 60
            assert engine.pool.num_held == 3, "of 60 tokens, the 5 that the next one sees, and the last of them sees"
        if others:
            engine.generate([row(others, seed=others)], SamplingParams(max_tokens=1))
        before = tokens
        (done,) = engine.generate([prompt], SamplingParams(max_tokens=5))
        assert_greedy(model, prompt, list(done.tokens))
        computed.append(tokens - before - 4)
        engine.check_integrity()
    assert computed == [61, 1, 61, 1]
    # Who asks for just what is pinned computes its last page again, and finds the rest.
    engine.generate([row(90, seed=92)], SamplingParams(max_tokens=1))
    before = tokens
    engine.generate([prompt[:60]], SamplingParams(max_tokens=1))
    assert tokens - before <= 4


@pytest.mark.parametrize("architecture", WINDOWED)
@pytest.mark.parametrize("settings", [{}, {"prefix_cache": False}, {"offload_bytes": 64 * 4096}], ids=str)
def test_full_pools_shared_beginnings_preemptions_and_guesses_leave_every_answer_right(architecture, settings):
    model = model_of(architecture)
    layout = Engine(model_of(architecture), engine_config()).pool.layout
    pages = 30 * layout.num_groups
    engine = Engine(
        model, engine_config(kv_bytes=pages * layout.page_bytes, max_batch_tokens=24, draft_tokens=3, **settings)
    )
    preempt, num_preempted, num_kept = engine._holdings.preempt, 0, 0

    def count(sequence, *, offload):
        nonlocal num_preempted, num_kept
        preempt(sequence, offload=True)
        num_preempted += 1
        num_kept += sequence.kept is not None

    engine._holdings.preempt = count  # type: ignore[method-assign]
    chance = random.Random(3)
    trunks = [row(40, seed=seed) for seed in (1, 2)]
    prompts = {
        f"r{number}": chance.choice(trunks)[: chance.randint(1, 40)] + row(chance.randint(1, 20), seed=100 + number)
        for number in range(20)
    }
    answers: dict[str, list[int]] = {name: [] for name in prompts}
    unsent = list(prompts)
    steps = 0
    while unsent or engine.has_work:
        if unsent and chance.random() < 0.5:
            name = unsent.pop(0)
            engine.add(name, prompts[name], SamplingParams(max_tokens=18))
        for event in engine.step():
            answers[event.request_id].append(event.token)
        steps += 1
        assert steps < 2000
        if steps % 6 == 0 and engine._running:
            engine._preempt(chance.choice(engine._running), offload=True)
        if settings.get("prefix_cache") is False:
            poison_free_pages(engine)
        engine.check_integrity()
    for name, prompt in prompts.items():
        assert_greedy(model, prompt, answers[name])
        assert len(answers[name]) == 18
    assert num_preempted > 5
    assert (num_kept > 0) == ("offload_bytes" in settings)
    assert engine.pool.num_held == 0


@pytest.mark.parametrize("architecture", WINDOWED)
@pytest.mark.parametrize("length", [3, 8, 45])
def test_only_what_is_still_needed_travels_and_the_answer_is_the_same(architecture, length):
    prompt, params = row(length), SamplingParams(max_tokens=20)
    split = Split(architecture, "memory", model_of)
    first, ticket = split.offer(prompt, params)
    layout = split.prefill.pool.layout
    if length == 45:
        assert len(ticket.pages) < layout.num_pages(length)
    arrival = split.pull(ticket)
    assert arrival.pages is not None
    assert split.leases.release(ticket.ticket_id)
    poison_free_pages(split.decode)
    answer = split.finish(prompt, params, first, arrival.pages)
    assert_greedy(split.prefill._runner._model, prompt, answer)
    assert len(set(answer)) >= 6
    for engine in (split.prefill, split.decode):
        engine.check_integrity()
        assert engine.pool.num_held == 0
    split.close()
