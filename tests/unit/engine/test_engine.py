"""The engine equals transformers' generate, however its work is cut and ordered."""

from __future__ import annotations

import pytest
import torch
from tests.unit.engine.tiny import ARCHITECTURES, VOCAB, engine_config, prompts, reference, tiny_model

from farspan.engine.engine import Engine
from farspan.engine.probe import plain_logits
from farspan.engine.request import FailedEvent, SamplingParams, TokenEvent
from farspan.engine.runner import Piece
from farspan.errors import EngineError, ModelError, RequestError

GREEDY = SamplingParams(max_tokens=20)


@pytest.mark.parametrize("max_batch_tokens", [1, 7, 64])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_equal_transformers_generate_for_every_chunk_size(architecture, max_batch_tokens):
    model = tiny_model(architecture)
    asked = prompts(1, 5, 33, 70)
    expected = [reference(model, prompt, GREEDY.max_tokens) for prompt in asked]
    engine = Engine(model, engine_config(max_batch_tokens=max_batch_tokens))
    answers = engine.generate(asked, GREEDY)
    assert [list(answer.tokens) for answer in answers] == expected
    assert {answer.finish for answer in answers} == {"length"}
    engine.check_integrity()
    assert engine.pool.num_held == 0


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_of_chunked_mixed_batches_equal_plain_logits(architecture, chunk):
    model = tiny_model(architecture)
    engine = Engine(model, engine_config())
    runner, pool = engine._runner, engine.pool
    tokens = prompts(90, 41)
    plain = [plain_logits(model, torch.tensor(row)) for row in tokens]
    pages = [pool.alloc(pool.layout.num_pages(len(row))) for row in tokens]
    done = [0, 0]
    while any(done[i] < len(tokens[i]) for i in range(2)):
        # The second sequence goes in steps of its own, so that decode rows and segments meet in one batch.
        todo = [(i, size) for i, size in enumerate((chunk, 1)) if done[i] < len(tokens[i])]
        pieces = [Piece(tokens[i][done[i] : done[i] + size], done[i], pages[i]) for i, size in todo]
        for (i, _), piece, logits in zip(todo, pieces, runner.run(pieces), strict=True):
            done[i] += len(piece.tokens)
            assert float((logits - plain[i][done[i] - 1]).abs().max()) <= 1e-8


def test_requests_arriving_at_different_times_do_not_change_each_other():
    model = tiny_model()
    asked = prompts(3, 40, 17, 66, 9)
    expected = {f"r{i}": reference(model, prompt, 20) for i, prompt in enumerate(asked)}
    engine = Engine(model, engine_config(max_batch_tokens=16))
    answers: dict[str, list[int]] = {name: [] for name in expected}
    for step in range(200):
        if step % 4 == 0 and step // 4 < len(asked):
            engine.add(f"r{step // 4}", asked[step // 4], GREEDY)
        for event in engine.step():
            assert isinstance(event, TokenEvent)
            answers[event.request_id].append(event.token)
    assert answers == expected


@pytest.mark.parametrize("settings", [{"prefix_cache": False}, {}, {"offload_bytes": 1024 * 1024}], ids=str)
def test_preemption_under_a_tiny_pool_changes_no_token(settings):
    model = tiny_model()
    asked = prompts(10, 12, 14, 9)
    params = SamplingParams(max_tokens=30)
    expected = [reference(model, prompt, 30) for prompt in asked]
    page_bytes = Engine(tiny_model(), engine_config()).pool.layout.page_bytes
    engine = Engine(model, engine_config(kv_bytes=14 * page_bytes, **settings))
    preempted: list[bool] = []
    preempt = engine._preempt

    def count(sequence, *, offload):
        # Forced: what is cheaper depends on how busy the machine is.
        preempt(sequence, offload=True)
        preempted.append(sequence.kept is not None)

    engine._preempt = count
    answers = engine.generate(asked, params)
    assert [list(answer.tokens) for answer in answers] == expected
    assert preempted, "the pool was not small enough to prove anything"
    assert all(kept == ("offload_bytes" in settings) for kept in preempted)
    engine.check_integrity()
    assert engine.pool.num_free == engine.pool.num_pages == 14


def test_computing_a_sequence_again_costs_what_prompts_cost_and_what_decoding_costs_until_there_was_one():
    engine = Engine(tiny_model(), engine_config(offload_bytes=1024 * 1024))
    holdings, page = engine._holdings, engine.pool.layout.page_tokens
    assert holdings.costs().token_s == 0
    holdings.learn_pace(0.016, [1] * 16)
    assert holdings.costs().token_s == pytest.approx(1e-3)
    holdings.learn_pace(0.05, [1, 1, 500])
    assert holdings.costs().token_s == pytest.approx(0.05 / 502)
    for _ in range(100):
        # Mostly answers, or guesses after each token, or what is left of a prompt: not what a prompt is like.
        holdings.learn_pace(0.016, [*[1] * 2 * page, page])
        holdings.learn_pace(0.03, [page - 1] * 8)
    assert holdings.costs().token_s == pytest.approx(0.05 / 502)
    for _ in range(100):
        holdings.learn_pace(0.1, [500])
        # A short one costs as much as it costs, and counts as little as it is long.
        holdings.learn_pace(0.002, [page])
    assert holdings.costs().token_s == pytest.approx(0.102 / (500 + page), rel=0.01)


def test_an_answer_resumed_after_any_token_goes_on_the_same_also_when_sampled():
    model = tiny_model()
    (prompt,) = prompts(21)
    params = SamplingParams(max_tokens=16, temperature=0.9, top_p=0.95, top_k=40, seed=11)
    engine = Engine(model, engine_config())
    whole = list(engine.generate([prompt], params)[0].tokens)
    assert len(set(whole)) >= 6
    assert whole != list(engine.generate([prompt], SamplingParams(max_tokens=16))[0].tokens)
    for cut in (1, 7, 15):
        engine.add("resumed", prompt, params, answered=whole[:cut])
        rest = [event.token for _ in range(16 - cut) for event in engine.step()]
        assert rest == whole[cut:]


def test_text_ends_at_eos_and_stop_tokens_unless_told_otherwise():
    model = tiny_model()
    (prompt,) = prompts(12)
    free = reference(model, prompt, 20)
    end = free[4]
    stopped = tiny_model(eos_token_id=end)
    expected = free[: free.index(end) + 1]
    engine = Engine(stopped, engine_config())
    answer = engine.generate([prompt], GREEDY)[0]
    assert (list(answer.tokens), answer.finish) == (expected, "stop")
    assert list(engine.generate([prompt], SamplingParams(max_tokens=20, ignore_eos=True))[0].tokens) == free
    stop = SamplingParams(max_tokens=20, ignore_eos=True, stop_token_ids=frozenset({free[2]}))
    assert list(engine.generate([prompt], stop)[0].tokens) == free[: free.index(free[2]) + 1]


@pytest.mark.parametrize(
    ("prompt", "params", "reason"),
    [
        ([], GREEDY, "empty"),
        ([5, VOCAB], GREEDY, "outside the vocabulary"),
        ([5, -1], GREEDY, "outside the vocabulary"),
        ([1] * 512, GREEDY, "at most 511"),
        ([1] * 300, GREEDY, "engine.kv_bytes"),
        ([1], SamplingParams(max_tokens=0), "max_tokens"),
        ([1], SamplingParams(temperature=float("nan")), "temperature"),
        ([1], SamplingParams(top_p=0.0), "top_p"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_alone(prompt, params, reason):
    model = tiny_model()
    (good,) = prompts(8)
    expected = reference(model, good, 20)
    engine = Engine(model, engine_config(kv_bytes=64 * 4 * 3 * 2 * 16 * 8))
    engine.add("good", good, GREEDY)
    with pytest.raises(RequestError, match=reason):
        engine.add("bad", prompt, params)
    tokens = [event.token for _ in range(20) for event in engine.step()]
    assert tokens == expected
    engine.check_integrity()


def test_nan_logits_fail_their_request_only_and_poison_no_page():
    model = tiny_model()
    (good,) = prompts(8)
    good = [token for token in good if token != 3]
    expected = reference(model, good, 20)
    assert 3 not in expected
    engine = Engine(model, engine_config())
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = float("nan")
    engine.add("bad", [1, 3, 2], GREEDY)
    engine.add("good", good, GREEDY)
    events = [event for _ in range(21) for event in engine.step()]
    failed = [event for event in events if isinstance(event, FailedEvent)]
    assert [event.request_id for event in failed] == ["bad"]
    assert "NaN" in str(failed[0].error)
    assert [event.token for event in events if isinstance(event, TokenEvent)] == expected
    assert list(engine.generate([good], GREEDY)[0].tokens) == expected
    assert engine.pool.num_free == engine.pool.num_pages


@pytest.mark.parametrize(
    ("architecture", "settings", "reason"),
    [
        ("bert", {}, "encoder"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "dynamic"),
    ],
)
def test_a_model_the_engine_cannot_run_exactly_is_refused_with_the_reason(architecture, settings, reason):
    with pytest.raises(ModelError, match=reason):
        Engine(tiny_model(architecture, **settings), engine_config())


def test_a_model_whose_paged_logits_differ_is_refused_by_the_self_check():
    model = tiny_model()

    class Crooked(type(model.model.norm)):
        def forward(self, hidden_states):
            out = super().forward(hidden_states)
            # Looks at its neighbours in the batch, as batch normalisation does.
            return out + out.mean(1, keepdim=True)

    crooked = Crooked(48)
    crooked.weight = model.model.norm.weight
    crooked.variance_epsilon = model.model.norm.variance_epsilon
    model.model.norm = crooked
    with pytest.raises(ModelError, match="packed and paged logits differ"):
        Engine(model, engine_config())


def test_a_pool_too_small_for_one_page_names_the_field():
    with pytest.raises(EngineError, match=r"engine\.kv_bytes"):
        Engine(tiny_model(), engine_config(kv_bytes=1024))
