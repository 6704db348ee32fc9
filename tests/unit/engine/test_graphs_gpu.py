"""Decode by CUDA graphs on a real GPU: the tokens and logits of decode that is launched kernel by kernel."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
import torch
from tests.support.zoo import zoo_model
from tests.unit.engine.tiny import engine_config, prompts, tiny_model
from torch import nn
from transformers import PreTrainedModel

from farspan.engine.engine import Engine
from farspan.engine.request import SamplingParams, TokenEvent
from farspan.engine.runner import Piece, Runner

pytestmark = pytest.mark.gpu
NUM_TOKENS = 24


def model_of(architecture: str, dtype: torch.dtype) -> PreTrainedModel:
    """gemma2 has windows of 6 tokens, layers that see everything, and soft caps."""
    model = zoo_model(architecture) if architecture == "gemma2" else tiny_model(architecture)
    return model.to(dtype).cuda()


def engine_of(model: PreTrainedModel, graph_rows: int, *, ahead: bool | None = None) -> Engine:
    dtype = str(model.dtype).removeprefix("torch.")
    settings = {"max_sequences": 8, "max_context_tokens": 200, "page_tokens": 16, "prefix_cache": False}
    return Engine(model, engine_config(dtype=dtype, graph_rows=graph_rows, **settings), ahead=ahead)


def runner_of(engine: Engine) -> Runner:
    assert isinstance(engine._runner, Runner)
    return engine._runner


def questions(model: PreTrainedModel) -> list[list[int]]:
    vocab_size = model.config.vocab_size
    return [[token % vocab_size for token in prompt] for prompt in prompts(5, 17, 33, 2, 90, 21, 4)]


def greedy(engine: Engine, asked: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    return [list(answer.tokens) for answer in engine.generate(asked, params)]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_tokens_by_graphs_equal_tokens_kernel_by_kernel(architecture: str) -> None:
    model = model_of(architecture, torch.float32)
    asked = questions(model)
    one_by_one = engine_of(model, 0)
    assert runner_of(one_by_one)._graphs is None
    want = greedy(one_by_one, asked)
    by_graphs = engine_of(model, 8)
    graphs = runner_of(by_graphs)._graphs
    assert graphs is not None
    assert graphs.sizes == [1, 2, 4, 8]
    assert greedy(by_graphs, asked) == want
    assert max(len(set(tokens)) for tokens in want) >= 6
    by_graphs.check_integrity()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_answers_one_step_ahead_equal_those_of_one_step_after_the_other(architecture, dtype) -> None:
    model = model_of(architecture, dtype)
    asked = questions(model)
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 7},
        {"temperature": 0.9, "top_p": 0.8},
        {"temperature": 1.1, "min_p": 0.05},
    ]
    answers = []
    for ahead in (False, True):
        engine = engine_of(model, 8, ahead=ahead)
        for number, prompt in enumerate(asked):
            stops = frozenset(range(3 * number, 3 * number + 3))
            length, kind = 20 + 6 * number, kinds[number % 5]
            params = SamplingParams(max_tokens=length, seed=5, request=number, stop_token_ids=stops, **kind)
            engine.add(f"r{number}", prompt, params)
        told: dict[str, list[tuple[int, str | None]]] = {}
        num_ahead = 0
        while engine.has_work:
            for event in engine.step():
                assert isinstance(event, TokenEvent)
                told.setdefault(event.request_id, []).append((event.token, event.finish))
            engine.check_integrity()
            assert engine._steady is not None
            num_ahead += len(list(engine._steady.owned()))
        assert engine.pool.num_free == engine.pool.num_pages
        assert (num_ahead > 10) == ahead
        answers.append(told)
    assert answers[0] == answers[1]


def test_a_step_ahead_is_launched_without_waiting_for_the_device() -> None:
    engine = engine_of(model_of("llama", torch.float32), 8, ahead=True)
    for number, prompt in enumerate(prompts(5, 17, 33)):
        params = SamplingParams(max_tokens=100, temperature=0.7 * (number % 2), top_k=number, ignore_eos=True)
        engine.add(f"r{number}", prompt, params)
    for _ in range(40):
        engine.step()
    before = torch.cuda.get_sync_debug_mode()
    # An event of what was launched before is no waiting in this sense; whatever stops the whole stream is.
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(40):
            assert len(engine.step()) == 3
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_logits_of_a_replay_equal_those_kernel_by_kernel_whoever_joins_or_leaves(architecture, dtype) -> None:
    model = model_of(architecture, dtype)
    engine = engine_of(model, 8)
    runner, pool = runner_of(engine), engine.pool
    plain = Runner(model, pool, runner.survey)
    rows = questions(model)
    pages = [pool.alloc(pool.layout.num_pages(len(row) + NUM_TOKENS)) or [] for row in rows]
    plain.run([Piece(row, 0, held) for row, held in zip(rows, pages, strict=True)])
    # The longest row crosses from page to page; who is asked changes from step to step.
    for step in range(20):
        chosen = [row for row in range(len(rows)) if (step + row) % 4 != 3]
        pieces = [Piece([(7 * step + row) % 50], len(rows[row]), pages[row]) for row in chosen]
        want, got = plain.run(pieces).double(), runner.run(pieces).double()
        assert float((got - want).norm() / want.norm()) <= (1e-4 if dtype == torch.float32 else 2e-2)
        for row, piece in zip(chosen, pieces, strict=True):
            rows[row] = [*rows[row], *piece.tokens]


def test_a_model_that_waits_for_the_device_is_launched_kernel_by_kernel(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("llama", torch.float32)
    want = greedy(engine_of(model, 0), questions(model))

    def wait(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        args[0].sum().item()

    handle = model.get_output_embeddings().register_forward_pre_hook(wait)
    with caplog.at_level(logging.WARNING, "farspan.engine.path"):
        engine = engine_of(model, 8)
    assert runner_of(engine)._graphs is None
    assert [r for r in caplog.records if "decode is launched kernel by kernel" in r.getMessage()]
    assert greedy(engine, questions(model)) == want
    handle.remove()


def test_a_replay_takes_less_time_than_its_kernels_one_by_one() -> None:
    model = tiny_model("llama", num_hidden_layers=16).bfloat16().cuda()
    engine = engine_of(model, 8)
    runner, pool = runner_of(engine), engine.pool
    plain = Runner(model, pool, runner.survey)
    pieces = [Piece([3], 20, pool.alloc(2) or []) for _ in range(8)]
    seconds: dict[str, float] = {}
    for name, one in (("graph", runner), ("kernels", plain)):
        one.run(pieces)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(20):
            one.run(pieces)
        torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - began
    assert seconds["graph"] < 0.5 * seconds["kernels"], seconds
