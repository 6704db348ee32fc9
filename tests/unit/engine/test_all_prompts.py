"""Prompts of a batch attended in one call from their pages give the logits of a plain forward."""

from __future__ import annotations

import pytest
import torch
from tests.support.double import DoublePrecision
from tests.unit.engine.test_windows import WINDOWED, assert_greedy, model_of, poison_free_pages, row
from tests.unit.engine.tiny import engine_config

from farspan.engine import survey
from farspan.engine.attention import Segment, list_prompts
from farspan.engine.engine import Engine
from farspan.engine.request import SamplingParams
from farspan.kernels.paged_prefill.reference import attend_prompts_reference
from farspan.kv.layout import GONE
from farspan.models.rules import LayerRule


@pytest.fixture(autouse=True)
def double_precision():
    with DoublePrecision():
        yield


@pytest.mark.parametrize("architecture", [*WINDOWED, "gemma2"])
def test_answers_are_those_of_a_plain_forward_beside_decode_rows_and_with_nan_in_free_pages(architecture, monkeypatch):
    calls = []

    def attend(*inputs, **rule):
        calls.append(inputs[3])
        return attend_prompts_reference(*inputs, **rule)

    monkeypatch.setattr(survey, "choose_prompts_backend", lambda ask: attend)
    model = model_of(architecture)
    engine = Engine(model, engine_config(max_batch_tokens=13))
    calls.clear()
    asked = {str(length): row(length, seed=length) for length in (3, 41, 17)}
    answers: dict[str, list[int]] = {name: [] for name in asked}
    for name, prompt in asked.items():
        engine.add(name, prompt, SamplingParams(max_tokens=8))
    while engine.has_work:
        poison_free_pages(engine)
        for event in engine.step():
            answers[event.request_id].append(event.token)
        engine.check_integrity()
    for name, prompt in asked.items():
        assert_greedy(model, prompt, answers[name])
    # Several segments in a call, and some of them with a past.
    assert max(len(prompts.starts_B) for prompts in calls) > 1
    assert max(int(prompts.pasts_B.max()) for prompts in calls) > 0


def test_a_table_holds_no_page_that_is_gone_and_chunks_are_segments_of_their_own():
    pages_NG = torch.tensor([[GONE, 4], [7, 5], [8, 6], [9, 1]])
    windowed = list_prompts([Segment(5, 6, 9, pages_NG)], LayerRule(window=4), 0, 10, 4)
    assert windowed.tables_BN.tolist() == [[0, 7, 8, 9]]
    assert (windowed.starts_B.tolist(), windowed.pasts_B.tolist(), windowed.lows_B.tolist()) == ([0], [9], [6])
    chunked = list_prompts([Segment(5, 2, 0, pages_NG), Segment(7, 6, 9, pages_NG)], LayerRule(chunk=6), 1, 10, 4)
    assert chunked.starts_B.tolist() == [0, 2, 5]
    assert chunked.lengths_B.tolist() == [2, 3, 3]
    assert chunked.pasts_B.tolist() == [0, 9, 12]
    assert chunked.lows_B.tolist() == [0, 6, 12]
    assert chunked.tables_BN.tolist() == [[4, 0, 0, 0], [0, 5, 6, 0], [0, 0, 0, 1]]
    with pytest.raises(AssertionError, match="given back"):
        list_prompts([Segment(0, 6, 9, pages_NG)], LayerRule(), 0, 10, 4)
