"""One request on its way: admitted, read, asked of the workers once for each of its answers, counted."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from farspan.engine.detokenize import AnswerText, Detokenizer
from farspan.engine.request import Grammar, SamplingParams, choices
from farspan.errors import FarspanError
from farspan.serve.admission import wait_before_asking_again_s
from farspan.serve.calls import PlainReader, Reader, joined
from farspan.serve.chat import Delta, answer
from farspan.serve.choices import merged
from farspan.serve.faults import busy, is_past, too_late
from farspan.serve.limits import Meter
from farspan.serve.messages import Caller, GenerationRequest, WorkerInfo
from farspan.serve.metrics import Metrics
from farspan.serve.params import sampling
from farspan.serve.policy import Route
from farspan.serve.reply import Counted, Prompted, Step, Style
from farspan.serve.shape import ApiError
from farspan.serve.trace import RequestTrace
from farspan.serve.ways import Ways
from farspan.serve.wire import GenerationFields


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a request comes down to, whichever endpoint it came by."""

    asked: GenerationFields
    read: Callable[[int], list[Prompted]]
    """Its prompts as tokens, given how long they may be where the answer is to fit, too; slow for long ones."""
    max_tokens: int | None
    style: Style
    grammar: Grammar | None
    reader: Callable[[], Reader] = PlainReader
    """Reads the text of one answer."""
    telling: Any = None
    """The tokenizer that turns its tokens into text, where it is not the model's own."""
    passed_over: tuple[str, ...] = ()
    """Places of its fields that this model has no use for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What all requests share."""

    ways: Ways
    tokenizer: Any
    info: WorkerInfo
    metrics: Metrics
    max_wait_s: float | None = None
    """Longest wait for a first token that is taken on."""


class Answering:
    """Tells the steps of all answers of one request, as they come. `counted` is right once the first step came."""

    def __init__(
        self, question: Question, around: Surroundings, caller: Caller, meter: Meter, trace: RequestTrace
    ) -> None:
        self._question, self._around, self._caller, self._meter = question, around, caller, meter
        self._trace, self._routes = trace, dict[tuple[int, ...], Route]()
        self.counted = Counted(0, question.style)

    async def steps(self) -> AsyncGenerator[Step]:
        """
        Raises:
            ApiError: refused, or too late.
            FarspanError: it cannot be answered.
        """
        counting = self._around.metrics.request(self._trace, self.counted)
        admitted = self._meter.admitted(self._question.asked.num_answers)
        with counting, admitted, _told_as_late(self._caller.deadline_at_s):
            # In a thread: millions of characters take seconds, and other answers are on their way.
            prompts = await asyncio.to_thread(self._question.read, self._prompt_room)
            self._admit(prompts)
            answers = [self._answer(number, *branch) for number, branch in enumerate(self._branches(prompts))]
            async with aclosing(merged(answers) if len(answers) > 1 else answers[0]) as steps:
                while (step := await self._next(steps)) is not None:
                    before = self.counted.answer_tokens
                    self.counted.count(step.delta)
                    self._meter.charge(self.counted.answer_tokens - before)
                    yield step

    def _admit(self, prompts: Sequence[Prompted]) -> None:
        info = self._around.info
        for prompt in prompts:
            # Before it travels: the engine's thread would look at every token first.
            if len(prompt.tokens) >= info.max_context_tokens:
                most = info.max_context_tokens - 1
                message = f"the prompt has {len(prompt.tokens)} tokens, the model takes at most {most}"
                # Agents that shorten their conversation look for this code of OpenAI's.
                raise self._refused(message, code="context_length_exceeded")
            if not prompt.tokens:
                raise self._refused("the prompt is empty; give at least one token", code="invalid_value")
        self.counted.prompt_tokens = self._trace.prompt_tokens = sum(len(prompt.tokens) for prompt in prompts)
        self._meter.charge(self.counted.prompt_tokens)

    @property
    def _prompt_room(self) -> int:
        most, answer = self._most_tokens, self._question.max_tokens
        # An answer that is longer than anything is as long as there is room.
        return most - (answer if answer and answer < most else 1)

    @property
    def _most_tokens(self) -> int:
        """Of the longest prompt and answer."""
        return min(self._around.info.max_context_tokens, self._around.info.kv_tokens)

    def _refused(self, message: str, code: str) -> ApiError:
        return ApiError(400, message, code=code, param="messages" if self._question.style.chat else "prompt")

    def _branches(self, prompts: Sequence[Prompted]) -> Iterator[tuple[Prompted, GenerationRequest, AnswerText]]:
        asked = self._question.asked
        for prompt in prompts:
            # The engine's id is ours alone: a client that repeats its own cannot reach another request.
            for request_id, params in choices(uuid.uuid4().hex, replace(self._params(prompt), n=asked.n)):
                telling = self._question.telling or self._around.tokenizer
                text = AnswerText(
                    Detokenizer(telling),
                    asked.stop,
                    asked.min_tokens,
                    shows_stop=asked.include_stop_str_in_output,
                    by_token=asked.num_top_logprobs is not None,
                )
                yield prompt, GenerationRequest(request_id, prompt.tokens, params, self._caller), text

    def _params(self, prompt: Prompted) -> SamplingParams:
        question, room = self._question, self._most_tokens - len(prompt.tokens)
        most = max(1, room) if question.max_tokens is None else max(1, question.max_tokens)
        end = self._around.tokenizer.eos_token_id
        # The tokenizer's own end of text, for models whose config does not name it.
        return sampling(question.asked, most, () if end is None else (int(end),), question.grammar)

    def _answer(
        self, number: int, prompted: Prompted, request: GenerationRequest, text: AnswerText
    ) -> AsyncGenerator[Step]:
        route = self._route(request)
        # Numbered now: which of them is asked for first is chance.
        trace = self._trace.choice(number)
        trace.note(route)
        deltas = answer(request, route, self._around.ways.workers(request, route), text, trace)
        return _read(number, deltas, _Reading(prompted, self._question.reader(), self._stop_tokens), trace)

    @property
    def _stop_tokens(self) -> frozenset[int]:
        """Tokens that end an answer because the client says so."""
        asked = self._question.asked
        return frozenset(asked.stop_token_ids) - (set() if asked.ignore_eos else {self._around.tokenizer.eos_token_id})

    def _route(self, request: GenerationRequest) -> Route:
        """The same way for all answers to a prompt: they share its pages. Raises ApiError when it would be too late."""
        route = self._routes.get(request.prompt) or self._around.ways.way(request)
        if not self._routes:
            at_s = self._caller.deadline_at_s
            left_s = None if at_s is None else at_s - time.time()
            after_s = wait_before_asking_again_s(route, left_s, self._around.max_wait_s)
            if after_s is not None:
                raise busy(after_s)
        self._routes[request.prompt] = route
        return route

    async def _next(self, steps: AsyncGenerator[Step]) -> Step | None:
        at_s = self._caller.deadline_at_s
        # Not one deadline around all: the steps of a generator may be asked for by different tasks.
        async with asyncio.timeout(None if at_s is None else max(0.0, at_s - time.time())):
            return await anext(steps, None)


async def _read(
    number: int, deltas: AsyncGenerator[Delta], reading: _Reading, trace: RequestTrace
) -> AsyncGenerator[Step]:
    """One answer, to its end or to where nothing more of it is told: then the workers stop too."""
    async with aclosing(deltas):
        async for delta in deltas:
            step = reading.step(replace(delta, index=number) if number else delta)
            if step.finish is not None:
                trace.finish = trace.finish or "stop"
            yield step
            if step.finish is not None:
                return


class _Reading:
    """One answer while it is read."""

    def __init__(self, prompted: Prompted, reader: Reader, stop_tokens: frozenset[int]) -> None:
        self._prompted, self._reader, self._stop_tokens = prompted, reader, stop_tokens
        self._first, self._called = True, False

    def step(self, delta: Delta) -> Step:
        said = self._reader.push(delta.text)
        if delta.finish is not None:
            said = joined(said, self._reader.finish())
        first, self._first = self._first, False
        self._called = self._called or bool(said.calls)
        over = self._reader.over
        finish = "tool_calls" if over or (self._called and delta.finish == "stop") else delta.finish
        return Step(delta, said, self._prompted, first, finish, self._stop_reason(delta))

    def _stop_reason(self, delta: Delta) -> str | int | None:
        if delta.stop is not None or delta.finish != "stop":
            return delta.stop
        return next((token for token in delta.tokens[-1:] if token in self._stop_tokens), None)


@contextmanager
def _told_as_late(deadline_at_s: float | None) -> Iterator[None]:
    """After a deadline, whatever ends a request is the deadline."""
    try:
        yield
    except (TimeoutError, FarspanError):
        if is_past(deadline_at_s):
            raise too_late() from None
        raise
