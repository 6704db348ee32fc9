"""First-class architectures give transformers' logits and tokens, however the work is cut, ordered and interrupted."""

from __future__ import annotations

import pytest
import torch
from tests.support.double import DoublePrecision
from tests.support.zoo import VOCAB, zoo_model
from tests.unit.engine.first_class import PATHS, SETTINGS, WITHOUT_PAGES, kinds, model_of
from tests.unit.engine.oracle import chunked_logits, whole_logits
from tests.unit.engine.tiny import engine_config
from transformers import PreTrainedModel

from farspan.engine.engine import Engine
from farspan.engine.request import SamplingParams
from farspan.engine.runner import seen_pages
from farspan.errors import RequestError

NUM_TOKENS = 16


def rows(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def assert_greedy(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> None:
    """Every token is the most likely one after those before it, by one plain forward."""
    choices = whole_logits(model, [*prompt, *answer])[len(prompt) - 1 : -1].argmax(1).tolist()
    assert answer == choices
    assert len(set(answer)) >= 6, f"a vacuous answer: {answer}"


@pytest.mark.parametrize("architecture", PATHS)
def test_logits_of_mixed_batches_equal_transformers_for_every_chunk_size(architecture):
    model = model_of(architecture)
    with DoublePrecision():
        engine = Engine(model, engine_config())
        assert engine.path == PATHS[architecture]
        longest = rows(66, 9, 13)
        wanted = [whole_logits(model, row) for row in longest]
        for chunk, most in ((1, 18), (7, 40), (16, 40), (64, 66)):
            prompts = [row[:most] for row in longest]
            for row, position, logits_V in chunked_logits(engine, prompts, chunk):
                error = float((logits_V - wanted[row][position]).abs().max())
                assert error <= 1e-8 * max(1.0, float(wanted[row][position].abs().max())), (chunk, row, position)
        engine.check_integrity()


@pytest.mark.parametrize("architecture", PATHS)
def test_greedy_answers_equal_transformers_also_when_sequences_are_preempted_and_computed_again(architecture):
    model = model_of(architecture)
    prompts = rows(10, 23, 5, 14)
    with DoublePrecision():
        engine = Engine(model, engine_config(max_batch_tokens=12))
        answers: dict[str, list[int]] = {}
        for number, prompt in enumerate(prompts):
            engine.add(f"r{number}", prompt, SamplingParams(max_tokens=NUM_TOKENS))
            answers[f"r{number}"] = []
        steps = 0
        while engine.has_work:
            for event in engine.step():
                answers[event.request_id].append(event.token)
            steps += 1
            if steps in (3, 6, 11) and engine._running:
                engine._preempt(engine._running[steps % len(engine._running)], offload=False)
            engine.check_integrity()
        for number, prompt in enumerate(prompts):
            assert_greedy(model, prompt, answers[f"r{number}"])
        assert all(len(answer) == NUM_TOKENS for answer in answers.values())
    assert engine.pool.num_held == 0
    assert engine.states is None or engine.states.num_free == engine.states.num_slots


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "deepseek_v3", "qwen3_next", "mamba2"])
def test_greedy_answers_equal_transformers_generate(architecture):
    model = model_of(architecture)
    (prompt,) = rows(19, seed=4)
    with DoublePrecision():
        engine = Engine(model, engine_config())
        answer = list(engine.generate([prompt], SamplingParams(max_tokens=NUM_TOKENS))[0].tokens)
        again = zoo_model(architecture, **SETTINGS.get(architecture, {}))
        out = again.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
        )
    assert answer == out[0, len(prompt) :].tolist()
    assert len(set(answer)) >= 6


@pytest.mark.parametrize(
    "architecture", kinds(core=("llama", "gemma2", "gpt_oss", "deepseek_v3", "qwen3_next", "bamba"))
)
def test_bfloat16_errs_no_more_than_transformers_own(architecture):
    settings = SETTINGS.get(architecture, {})
    exact = zoo_model(architecture, torch.float32, **settings)
    tokens = rows(48, 40, seed=3)
    wanted = [whole_logits(exact, row) for row in tokens]
    half = exact.to(torch.bfloat16)
    own = [whole_logits(half, row).float() for row in tokens]
    engine = Engine(half, engine_config(dtype="bfloat16"))
    assert engine.path == PATHS[architecture]
    found = chunked_logits(engine, tokens, 16)
    ours = torch.stack([logits_V.float() for _, _, logits_V in found])
    at = [(row, position) for row, position, _ in found]
    exact_NV, own_NV = (torch.stack([some[row][position] for row, position in at]) for some in (wanted, own))
    assert float((ours - exact_NV).norm()) <= 1.5 * float((own_NV - exact_NV).norm())


@pytest.mark.parametrize("architecture", WITHOUT_PAGES)
def test_a_model_whose_pages_are_not_all_does_not_send_them_elsewhere(architecture):
    with DoublePrecision():
        engine = Engine(model_of(architecture), engine_config())
        assert not engine.pages_are_all
        with pytest.raises(RequestError, match="does not travel"):
            engine.add("r", [1, 2, 3], SamplingParams(), prefill_only=True)
        with pytest.raises(RequestError, match="does not travel"):
            engine.adopt("r", [1, 2, 3], SamplingParams(), [4], [])
    assert not engine.has_work


def test_pages_and_states_together_stay_within_the_configured_bytes():
    with DoublePrecision():
        engine = Engine(model_of("qwen3_next"), engine_config(kv_bytes=1_000_000, max_sequences=1000))
    assert engine.states is not None
    assert engine.pool.storage_PB.nbytes + engine.states.storage_SB.nbytes <= 1_000_000
    assert engine.states.num_slots >= 2
    assert engine.pool.num_pages >= 10


def test_a_window_gathers_only_the_pages_it_sees():
    with DoublePrecision():
        engine = Engine(model_of("gemma3_text"), engine_config())
    (sliding,) = [rule for rule, _ in engine._runner._tables if rule.window]
    assert len(seen_pages(1000, sliding, engine.pool.layout.page_tokens)) <= 3
    (full,) = [rule for rule, _ in engine._runner._tables if not rule.window]
    assert len(seen_pages(1000, full, engine.pool.layout.page_tokens)) == 251
