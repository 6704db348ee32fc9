"""Decode steps of a CPU, made again as they were recorded, give the logits and tokens of those that Python makes."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from tests.support.zoo import zoo_model
from tests.unit.engine.test_graphs import MOST_TOKENS, Rows
from tests.unit.engine.tiny import engine_config, prompts, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel

from farspan.engine import attention, recorded
from farspan.engine.engine import Engine
from farspan.engine.faster import speed_up
from farspan.engine.graphs import DecodeGraphs
from farspan.engine.path import capture_decode, open_path
from farspan.engine.recorded import record
from farspan.engine.request import SamplingParams
from farspan.engine.runner import Runner
from farspan.kernels.chain.dispatch import choose_chain
from farspan.kernels.paged_decode import write
from farspan.kernels.paged_decode.write import write_pages
from farspan.kernels.team.calls import Compiled
from farspan.kv.pages import PagePool

GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def two_runners(model: PreTrainedModel, most_rows: int) -> tuple[Runner, Runner, PagePool]:
    """(recorded, as Python makes it) over one pool."""
    path = open_path(model, engine_config(dtype=DTYPES[model.dtype], max_context_tokens=MOST_TOKENS))
    assert isinstance(path.runner, Runner)
    speed_up(model)
    plain = Runner(model, path.pool, path.runner.survey)
    assert capture_decode(path, most_rows, MOST_TOKENS)
    return path.runner, plain, path.pool


def one_row_recorded(model: PreTrainedModel) -> tuple[Runner, Runner, Rows]:
    """The same after enough steps of one row to record them."""
    steps, plain, pool = two_runners(model, 1)
    rows = Rows(pool, 1, 60)
    rows.prefill(plain, 0, 8)
    for _ in range(9):
        steps.run(rows.next([0]))
    return steps, plain, rows


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3_text", "phi3", "gpt_neox"])
def test_recorded_logits_equal_the_others_while_rows_join_leave_and_grow(architecture, dtype) -> None:
    steps, plain, pool = two_runners(zoo_model(architecture).to(dtype), 5)
    rows, chance = Rows(pool, 5, 100), random.Random(0)
    for row, length in enumerate((1, 2, 15, 16, 40)):
        rows.prefill(plain, row, length)
    for turn in range(40):
        size = (1, 3, 5)[turn % 3]
        pieces = rows.next(chance.sample(range(5), size))
        got, want = steps.run(pieces), plain.run(pieces)
        # The same kernels in the same order; torch's own in fp32 may sum by where their numbers lie in memory.
        assert torch.equal(got, want) if dtype == torch.bfloat16 else torch.allclose(got, want, rtol=0, atol=1e-5)
    assert steps.graphs == [1, 3, 5]


def test_an_engine_gives_the_same_tokens_recorded_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[int] = []
    own = DecodeGraphs.launch

    def watched(self: DecodeGraphs, size: int) -> bool:
        launched.append(size)
        return own(self, size)

    monkeypatch.setattr(DecodeGraphs, "launch", watched)
    model, asked = tiny_model().float(), prompts(5, 17, 33)
    sampled = SamplingParams(max_tokens=40, temperature=0.9, seed=3, ignore_eos=True)
    for params in (GREEDY, sampled):
        want = Engine(model, engine_config(dtype="float32", graph_rows=0)).generate(asked, params)
        assert not launched
        engine = Engine(model, engine_config(dtype="float32"))
        assert engine.generate(asked, params) == want
        assert len(launched) >= 20
        assert set(launched) == {3}
        assert len({token for answer in want for token in answer.tokens}) >= 6
        engine.check_integrity()
        launched.clear()


def test_more_rows_than_are_worth_it_and_rows_that_are_rare_are_not_recorded() -> None:
    steps, plain, pool = two_runners(tiny_model().float(), 2)
    rows = Rows(pool, 3, 60)
    for row in range(3):
        rows.prefill(plain, row, 8)
    for _ in range(12):
        steps.run(rows.next([0, 1, 2]))
    for _ in range(4):
        steps.run(rows.next([0]))
    assert steps.graphs == []
    for _ in range(12):
        steps.run(rows.next([0, 1]))
    assert steps.graphs == [2]


def test_nothing_is_recorded_while_no_page_is_free() -> None:
    steps, plain, pool = two_runners(tiny_model().float(), 2)
    rows = Rows(pool, 1, 60)
    rows.prefill(plain, 0, 8)
    held = pool.alloc(pool.num_free)
    for _ in range(12):
        steps.run(rows.next([0]))
    assert steps.graphs == []
    pool.free(held or [])
    steps.run(rows.next([0]))
    assert steps.graphs == [1]


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (lambda x, y: y.fill_(float(x.sum())), "looks at numbers"),
        (lambda x, y: y.fill_(x.tolist()[0]), "looks at numbers"),
        (lambda x, y: y.fill_(x.numpy()[0]), "looks at numbers"),
        (lambda x, y: y.copy_(torch.tensor(np.from_dlpack(x))[0]), "looks at numbers"),
        (lambda x, y: y.copy_(x[x > 0].sum()), "makes as much as its numbers say"),
        (lambda x, y: y.copy_(torch.rand_like(y)), "draws random numbers"),
    ],
)
def test_what_depends_on_numbers_that_python_sees_is_not_recorded(step, reason: str) -> None:
    x, y = torch.ones(3), torch.zeros(())
    with pytest.raises(RuntimeError, match=reason):
        record(lambda: step(x, y))


def refused(model: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> str:
    """Why no step of a model was recorded."""
    path = open_path(model, engine_config(dtype="float32", max_context_tokens=MOST_TOKENS))
    assert isinstance(path.runner, Runner)
    assert capture_decode(path, 2, MOST_TOKENS)
    rows = Rows(path.pool, 1, 60)
    rows.prefill(path.runner, 0, 8)
    with caplog.at_level(logging.INFO, "farspan.engine.graphs"):
        for _ in range(12):
            path.runner.run(rows.next([0]))
    assert path.runner.graphs == []
    assert path.pool.num_free + len(rows.pages[0]) == path.pool.num_pages
    (line,) = [record.getMessage() for record in caplog.records]
    return line


def test_a_step_that_keeps_what_it_saw_while_recorded_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model().float()
    embed = model.get_input_embeddings()
    own = embed.forward

    def peeks(tokens: Tensor) -> Tensor:
        with _disable_current_modes():
            seen = int(tokens[0, 0])
        return own(torch.full_like(tokens, seen) if tokens.shape == (1, 1) else tokens)

    embed.forward = peeks
    assert "captured logits of 1 rows differ" in refused(model, caplog)


def test_a_step_whose_keys_nobody_hears_of_is_refused(caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    def unheard(*given: Tensor) -> None:
        with _disable_current_modes():
            write_pages(*given)

    monkeypatch.setattr(write, "_write_compiled", lambda *_: False)
    monkeypatch.setattr(attention, "write_pages", unheard)
    monkeypatch.setattr(attention.BoundTokens, "of", lambda *_: None)
    assert "captured logits of 1 rows differ" in refused(tiny_model().float(), caplog)


def test_a_number_of_rows_that_cannot_be_recorded_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, plain, pool = two_runners(tiny_model().float(), 3)
    rows = Rows(pool, 3, 100)
    for row in range(3):
        rows.prefill(plain, row, 8)
    tried: list[int] = []

    def no_room(self: DecodeGraphs, size: int, *_: object) -> None:
        tried.append(size)
        raise MemoryError("no room")

    for _ in range(9):
        steps.run(rows.next([0]))
    with monkeypatch.context() as patch:
        patch.setattr(DecodeGraphs, "_prepare", no_room)
        for _ in range(12):
            steps.run(rows.next([0, 1]))
    for _ in range(9):
        steps.run(rows.next([0, 1, 2]))
    assert tried == [2]
    assert steps.graphs == [1, 3]


def test_the_eighth_step_of_so_many_rows_is_recorded() -> None:
    steps, plain, pool = two_runners(tiny_model().float(), 3)
    rows = Rows(pool, 1, 60)
    rows.prefill(plain, 0, 8)
    for _ in range(7):
        steps.run(rows.next([0]))
    assert steps.graphs == []
    steps.run(rows.next([0]))
    assert steps.graphs == [1]


def test_an_exchanged_weight_is_not_read_where_the_old_one_was() -> None:
    model = tiny_model().float()
    steps, plain, rows = one_row_recorded(model)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach() * 2)
    pieces = rows.next([0])
    assert torch.equal(steps.run(pieces), plain.run(pieces))
    assert steps.graphs == []


def test_views_stay_and_every_other_operation_is_made_again() -> None:
    x, y = torch.arange(6.0).view(2, 3), torch.zeros(3, 2)

    def step() -> None:
        turned = x.t().contiguous().view(-1).reshape(2, 3)
        high, where = (turned * 2 + 1)[torch.tensor([1, 0])].max(dim=0, keepdim=True)
        torch._assert_async(high.isfinite().all(), "numbers")
        whole = torch.cat([turned.to(torch.float64), high.double() + where], dim=0).float()
        y.copy_(whole[:2].t())
        y[0] += whole[2, 0]

    again = record(step)
    for seed in range(3):
        x.copy_(torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)))
        y.zero_()
        step()
        want = y.clone()
        y.zero_()
        again()
        assert torch.equal(y, want)


@pytest.mark.skipif(choose_chain("cpu", torch.bfloat16) is None, reason="no compiled chains on this machine")
def test_compiled_calls_in_a_row_are_made_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[int] = []
    own = recorded.bind_calls

    def watched(calls: Sequence[Compiled]) -> Callable[[], None]:
        together.append(len(calls))
        return own(calls)

    monkeypatch.setattr(recorded, "bind_calls", watched)
    model = tiny_model().bfloat16()
    steps, _, _ = one_row_recorded(model)
    assert steps.graphs == [1]
    # Angles; of each layer what is before attention, attention, and what is after it; the last normalization, the head.
    assert together == [3 * model.config.num_hidden_layers + 3]
