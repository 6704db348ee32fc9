"""Answers to a list of prompts from one engine, batched; for offline use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from farspan.engine.request import Completion, FailedEvent, SamplingParams, TokenEvent, choices, whole_answer
from farspan.errors import EngineError

if TYPE_CHECKING:
    from farspan.engine.engine import Engine


def generate(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Completion]:
    """`params.n` answers for each prompt, one after the other. Raises RequestError when one cannot be answered."""
    collected: dict[str, list[TokenEvent]] = {}
    try:
        for index, prompt in enumerate(prompts):
            for request_id, each in choices(f"prompt-{index}", replace(params, request=params.request + index)):
                engine.add(request_id, prompt, each)
                collected[request_id] = []
        num_open = len(collected)
        while num_open:
            events = engine.step()
            if engine.stalled:
                raise EngineError("the KV pages are held elsewhere; nothing can be computed")
            for event in events:
                if isinstance(event, FailedEvent):
                    raise event.error
                collected[event.request_id].append(event)
                num_open -= event.finish is not None
    finally:
        for request_id in collected:
            engine.cancel(request_id)
    return [whole_answer(events) for events in collected.values()]
