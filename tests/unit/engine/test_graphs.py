"""Captured decode gives the logits of decode that is launched kernel by kernel, and falls back where it cannot.

A CPU has no graphs: what is captured is run again instead, on the same inputs that stay where they are.
"""

from __future__ import annotations

import logging
import random

import pytest
import torch
from tests.support.double import DoublePrecision
from tests.support.zoo import VOCAB, zoo_model
from tests.unit.engine.again import rerun
from tests.unit.engine.oracle import whole_logits
from tests.unit.engine.tiny import engine_config, prompts, reference, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from farspan.engine.ahead import Course, Launched
from farspan.engine.capture import Step
from farspan.engine.engine import Engine
from farspan.engine.graphs import DecodeGraphs, ladder
from farspan.engine.path import capture_decode, open_path
from farspan.engine.request import SamplingParams
from farspan.engine.runner import Piece, Runner
from farspan.kv.pages import PagePool

MOST_TOKENS = 120
# Everything seen; windows; windows, full attention and a soft cap; sinks; latent keys; experts; biases and LayerNorm.
SETTINGS: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {},
    "gemma2": {},
    "gemma3_text": {},
    "gpt_oss": {},
    "deepseek_v3": {},
    "qwen3_moe": {},
    "gpt_neox": {"seed": 1},
}


class Rows:
    """Sequences of random tokens side by side, each with pages of its own."""

    def __init__(self, pool: PagePool, count: int, most_tokens: int) -> None:
        self._pool = pool
        generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(0, VOCAB, (count, most_tokens), generator=generator).tolist()
        self.pages = [pool.alloc(pool.layout.num_pages(most_tokens)) or [] for _ in range(count)]
        self.past = [0] * count

    def prefill(self, runner: Runner, row: int, length: int) -> None:
        runner.run([Piece(self.tokens[row][:length], 0, self.pages[row])])
        self.past[row] = length

    def next(self, rows: list[int]) -> list[Piece]:
        """The next token of each, with no more pages than it has by then, those gone that nobody reads."""
        pieces = []
        for row in rows:
            past, layout = self.past[row], self._pool.layout
            held = layout.without_gone(self.pages[row][: layout.num_pages(past + 1)], past)
            pieces.append(Piece(self.tokens[row][past : past + 1], past, held))
            self.past[row] += 1
        return pieces


def two_runners(model: PreTrainedModel, most_rows: int, **settings: object) -> tuple[Runner, Runner, PagePool]:
    """(captured, launched one by one) over one pool."""
    path = open_path(model, engine_config(max_context_tokens=MOST_TOKENS, **settings))
    assert isinstance(path.runner, Runner)
    plain = Runner(model, path.pool, path.runner.survey)
    assert capture_decode(path, most_rows, MOST_TOKENS, rerun)
    return path.runner, plain, path.pool


@pytest.fixture
def graph_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each step had that a graph computed."""
    seen: list[int] = []
    own = DecodeGraphs.run

    def watched(self: DecodeGraphs, pieces: list[Piece]) -> Tensor | None:
        found = own(self, pieces)
        if found is not None:
            seen.append(len(pieces))
        return found

    steady = Course.launch

    def watched_course(self: Course, grown: list[tuple[int, list[int]]]) -> Launched | None:
        seen.append(len(self._logits_NV))
        return steady(self, grown)

    monkeypatch.setattr(DecodeGraphs, "run", watched)
    monkeypatch.setattr(Course, "launch", watched_course)
    return seen


@pytest.mark.parametrize("architecture", SETTINGS)
def test_captured_logits_equal_the_others_while_rows_join_leave_and_grow(architecture, graph_steps) -> None:
    with DoublePrecision():
        model = zoo_model(architecture, **SETTINGS[architecture])
        captured, plain, pool = two_runners(model, 9)
        rows, chance = Rows(pool, 9, 60), random.Random(0)
        for row, length in enumerate((1, 2, 3, 7, 15, 16, 17, 30, 40)):
            rows.prefill(plain, row, length)
        for size in (1, 2, 3, 5, 9, 8, 4, 9, 6, 1):
            chosen = chance.sample(range(9), size)
            pieces = rows.next(chosen)
            want, got = plain.run(pieces), captured.run(pieces)
            assert float((got - want).abs().max()) <= 1e-12 * float(want.abs().max())
            for row, logits_V in zip(chosen[:1], got, strict=False):
                whole = whole_logits(model, rows.tokens[row][: rows.past[row]])[-1]
                assert float((logits_V - whole).abs().max()) <= 1e-8
    assert graph_steps == [1, 2, 3, 5, 9, 8, 4, 9, 6, 1]


def test_filling_rows_write_nothing_that_the_step_would_not_have_written(graph_steps) -> None:
    captured, plain, pool = two_runners(tiny_model(), 8)
    rows = Rows(pool, 5, 40)
    for row, length in enumerate((9, 4, 30, 11, 8)):
        rows.prefill(plain, row, length)
    pieces = rows.next([0, 1, 2, 3, 4])
    before = pool.storage_PB.clone()
    plain.run(pieces)
    want = pool.storage_PB.clone()
    assert not torch.equal(want, before)
    pool.storage_PB.copy_(before)
    captured.run(pieces)
    assert graph_steps == [5]
    where = (want != before).any(1)
    assert torch.equal((pool.storage_PB != before).any(1), where)
    near = pool.storage_PB.view(torch.float64) - want.view(torch.float64)
    assert float(near.abs().max()) <= 1e-12


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_an_engine_that_decodes_by_graphs_gives_transformers_tokens(architecture, graph_steps) -> None:
    model = tiny_model(architecture)
    engine = Engine(model, engine_config(max_sequences=6))
    assert isinstance(engine._runner, Runner)
    engine._runner.capture(6, engine.max_context_tokens, rerun)
    asked = prompts(5, 17, 33, 2, 9, 21, 4)
    answers = engine.generate(asked, SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
    assert [list(answer.tokens) for answer in answers] == [reference(model, prompt, 20) for prompt in asked]
    assert max(graph_steps) == 6
    assert len(graph_steps) >= 20
    engine.check_integrity()


def test_native_kernels_of_a_cpu_read_what_a_graph_would(graph_steps) -> None:
    captured, plain, pool = two_runners(tiny_model().float(), 4, dtype="float32")
    rows = Rows(pool, 3, 50)
    for row, length in enumerate((3, 22, 41)):
        rows.prefill(plain, row, length)
    for _ in range(5):
        pieces = rows.next([2, 0, 1])
        want = plain.run(pieces)
        assert float((captured.run(pieces) - want).abs().max()) <= 1e-5 * float(want.abs().max())
    assert graph_steps == [3] * 5


def test_what_is_no_single_token_of_the_model_alone_is_launched_kernel_by_kernel(graph_steps) -> None:
    captured, plain, pool = two_runners(tiny_model(), 2)
    rows = Rows(pool, 3, 30)
    for row in range(3):
        rows.prefill(plain, row, 8)
    several = [Piece(rows.tokens[0][8:11], 8, rows.pages[0]), *rows.next([1])]
    assert torch.equal(captured.run(several), plain.run(several))
    every = [Piece(rows.tokens[0][8:11], 8, rows.pages[0], num_logits=3)]
    assert torch.equal(captured.run(every), plain.run(every))
    more = rows.next([0, 1, 2])
    assert torch.equal(captured.run(more), plain.run(more))
    assert graph_steps == []


def test_long_beginnings_in_common_are_read_once_where_that_gains_more_than_one_launch(graph_steps) -> None:
    model = tiny_model().float()
    path = open_path(model, engine_config(dtype="float32", max_context_tokens=MOST_TOKENS))
    assert isinstance(path.runner, Runner)
    pool, survey = path.pool, path.runner.survey
    page_of_layer = pool.layout.page_bytes // pool.layout.num_layers
    few = Runner(model, pool, survey, launch_bytes=100 * page_of_layer)
    many = Runner(model, pool, survey, launch_bytes=27 * page_of_layer)
    for runner in (few, many):
        runner.capture(4, MOST_TOKENS, rerun)
    size = pool.layout.page_tokens
    beginning, *others = prompts(9 * size, 5, 1, 7, 9)
    held = pool.alloc(9) or []
    few.run([Piece(beginning, 0, held)])
    pieces = []
    for other in others:
        pages = [*held, *(pool.alloc(pool.layout.num_pages(len(other))) or [])]
        if other[:-1]:
            few.run([Piece(other[:-1], 9 * size, pages)])
        pieces.append(Piece(other[-1:], 9 * size + len(other) - 1, pages))
    graph_steps.clear()
    apart = few.run(pieces)
    assert graph_steps == [4]
    # Four rows of nine pages: 27 are not read.
    together = many.run(pieces)
    assert graph_steps == [4]
    assert float((apart - together).abs().max()) <= 1e-4


def refused(model: PreTrainedModel, capture, caplog: pytest.LogCaptureFixture, **settings: object) -> str:
    path = open_path(model, engine_config(**settings))
    free = path.pool.num_free
    with caplog.at_level(logging.WARNING, "farspan.engine.path"):
        assert not capture_decode(path, 4, MOST_TOKENS, capture)
    assert path.pool.num_free == free
    pages = path.pool.alloc(path.pool.layout.num_pages(6)) or []
    state = path.states.hold("row") if path.states else None
    logits = path.runner.run([Piece([3, 1, 4, 1, 5, 9], 0, pages, state)])
    assert float((logits[0] - whole_logits(model, [3, 1, 4, 1, 5, 9])[-1]).abs().max()) <= 1e-6
    (line,) = [record.getMessage() for record in caplog.records if record.name == "farspan.engine.path"]
    return line


def test_a_step_that_cannot_be_captured_is_launched_kernel_by_kernel_and_said_once(caplog) -> None:
    def waits(step: Step) -> Step:
        raise RuntimeError("operation not permitted when stream is capturing")

    assert "kernel by kernel: RuntimeError: operation not permitted" in refused(tiny_model(), waits, caplog)


def test_a_capture_that_computes_nothing_or_something_else_is_refused(caplog) -> None:
    assert "captured logits of 4 rows were never computed" in refused(tiny_model(), lambda step: lambda: None, caplog)
    caplog.clear()

    def once(step: Step) -> Step:
        step()
        return lambda: None

    assert "captured logits of 4 rows differ" in refused(tiny_model(), once, caplog)


def test_models_that_are_never_captured_say_why(caplog) -> None:
    assert "recurrent layers" in refused(zoo_model("qwen3_next"), rerun, caplog, dtype="float32")
    caplog.clear()
    chunked = zoo_model("llama4_text", attn_temperature_tuning=False, attention_chunk_size=6)
    assert "chunks begin within pages" in refused(chunked, rerun, caplog)


def test_an_exchanged_weight_is_not_read_where_the_old_one_was(graph_steps, caplog) -> None:
    model = tiny_model()
    captured, plain, pool = two_runners(model, 2)
    rows = Rows(pool, 1, 20)
    rows.prefill(plain, 0, 5)
    captured.run(rows.next([0]))
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach() * 2)
    pieces = rows.next([0])
    assert torch.equal(captured.run(pieces), plain.run(pieces))
    assert graph_steps == [1]
    assert [record.getMessage() for record in caplog.records if "exchanged" in record.getMessage()]


def test_there_is_a_graph_for_every_number_of_rows_and_few_of_its_rows_are_filled_up() -> None:
    for most in range(1, 257):
        sizes = ladder(most)
        assert sizes[-1] >= most
        assert len(sizes) <= 13
        for rows in range(1, most + 1):
            size = next(size for size in sizes if size >= rows)
            assert size < 2 * rows or rows == 1
            assert size <= 1.5 * rows or rows <= 16
