"""Many prompts, answered as fast as one engine can: ordered by what they share, always more waiting than fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from farspan.config.schema import EngineConfig
from farspan.engine.answer_file import AnswerFile
from farspan.engine.detokenize import whole_text
from farspan.engine.draft import NO_GUESSES, DraftUse
from farspan.engine.engine import Engine
from farspan.engine.groups import group_by_prefix
from farspan.engine.origin import Origin, origin_of
from farspan.engine.prompts import Answered, Line, Prompt, Question, as_prompt, count_lines, read_questions
from farspan.engine.request import FailedEvent, SamplingParams
from farspan.engine.terms import Terms
from farspan.errors import EngineError, RequestError
from farspan.models.checkpoint import load_causal_lm, load_tokenizer

Item = TypeVar("Item")

# Prompts that are ordered together: shared beginnings further apart are found while their pages last.
BLOCK_PROMPTS = 1024


@dataclass(slots=True)
class Progress:
    """How far a batch is."""

    total: int = 0
    """Lines to answer, with those that were answered before."""
    answered: int = 0
    failed: int = 0
    skipped: int = 0
    """Answered by an earlier run."""
    tokens: int = 0
    """Of the answers of this run."""
    drafted: DraftUse = NO_GUESSES
    """What came of guesses in this run."""

    @property
    def done(self) -> int:
        return self.answered + self.failed + self.skipped

    def count(self, answer: Answered) -> None:
        if answer.error is None:
            self.answered += 1
        else:
            self.failed += 1
        self.tokens += len(answer.tokens)


class OfflineEngine:
    """An engine that is asked many things at once."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase | None,
        max_sequences: int,
        origin: Origin | None = None,
    ) -> None:
        """Without a tokenizer, prompts and answers are tokens. `origin`: who answers; none: these weights."""
        self.engine, self.tokenizer = engine, tokenizer
        self.origin = origin or Origin(engine.pool.layout.model)
        # Twice as many as run side by side: whoever ends is followed at once.
        self._window = 2 * max_sequences

    @classmethod
    def open(cls, folder: Path, config: EngineConfig) -> OfflineEngine:
        """The model and tokenizer of a Hugging Face folder, on the GPU where there is one.

        Raises:
            CheckpointError: an incomplete folder.
            ModelError: a model that cannot be run exactly.
        """
        model = load_causal_lm(folder, getattr(torch, config.dtype))
        if torch.cuda.is_available():
            model = model.to("cuda")
        tokenizer = load_tokenizer(folder)
        engine = Engine(model, config, tokenizer=tokenizer)
        return cls(engine, tokenizer, config.max_sequences, origin_of(folder, config))

    def answers(self, lines: Iterable[Line]) -> Iterator[Answered]:
        """An answer for every line, as soon as it is there; a line that cannot be answered fails alone.

        Raises EngineError when nothing can be computed because the KV pages are held by somebody else, and after the
        last answer when a page belongs to nobody or to two: answers of this run may be of foreign pages, and those that
        were written are to be thrown away.
        """
        ahead = order_lines(lines)
        asked: dict[str, tuple[Prompt, list[int]]] = {}
        exhausted = False
        try:
            while asked or not exhausted:
                while len(asked) < self._window and not exhausted:
                    line = next(ahead, None)
                    exhausted = line is None
                    if isinstance(line, Answered):
                        yield line
                    elif line is not None and (refused := self._ask(line)) is not None:
                        yield refused
                    elif line is not None:
                        asked[line.id] = (line, [])
                yield from self._step(asked)
            self.engine.check_integrity()
        finally:
            for request_id in asked:
                self.engine.cancel(request_id)

    def _ask(self, prompt: Prompt) -> Answered | None:
        try:
            self.engine.add(prompt.id, prompt.tokens, prompt.params, terms=Terms(adapter=prompt.adapter))
        except RequestError as problem:
            return Answered(prompt.id, prompt.line, error=problem.reason)
        return None

    def _step(self, asked: dict[str, tuple[Prompt, list[int]]]) -> Iterator[Answered]:
        events = self.engine.step()
        if self.engine.stalled:
            raise EngineError("the KV pages are held elsewhere; nothing can be computed")
        for event in events:
            prompt, tokens = asked[event.request_id]
            if isinstance(event, FailedEvent):
                del asked[event.request_id]
                reason = event.error.reason if isinstance(event.error, RequestError) else str(event.error)
                yield Answered(prompt.id, prompt.line, error=reason)
                continue
            tokens.append(event.token)
            if event.finish:
                del asked[event.request_id]
                yield self._answered(prompt, tokens, event.finish)

    def _answered(self, prompt: Prompt, tokens: list[int], finish: str) -> Answered:
        """The answer as HTTP would tell it."""
        text = None
        if self.tokenizer is not None:
            text, finish = whole_text(self.tokenizer, tokens, finish, prompt.params)
        return Answered(
            prompt.id, prompt.line, tuple(tokens), text, finish, num_prompt=len(prompt.tokens), asked=prompt.asked
        )


def order_lines(lines: Iterable[Line]) -> Iterator[Line]:
    """The same lines, block by block, neighbours sharing as much as they can; what is refused comes first."""
    for block in in_blocks(lines, BLOCK_PROMPTS):
        yield from (line for line in block if isinstance(line, Answered))
        for group in in_groups([line for line in block if isinstance(line, Prompt)]):
            yield from group


def in_groups(asked: Sequence[Prompt]) -> list[list[Prompt]]:
    """All prompts in groups that begin alike, neighbours having most in common."""
    found: list[list[Prompt]] = []
    # Nothing is shared between adapters.
    for adapter in dict.fromkeys(prompt.adapter for prompt in asked):
        prompts = [prompt for prompt in asked if prompt.adapter == adapter]
        groups = group_by_prefix([p.tokens for p in prompts], [p.params.max_tokens for p in prompts])
        found += [[prompts[member] for member in group.members] for group in groups]
    return found


def in_blocks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive blocks of at most `size`, each read when it is asked for."""
    ahead = iter(items)
    while block := list(islice(ahead, size)):
        yield block


def open_lines(
    prompts: Path,
    answers: AnswerFile,
    params: SamplingParams,
    origin: Origin,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[Progress, Iterator[Line]]:
    """How far a file is, and the lines an earlier run has not answered.

    Raises NotFoundError when there is no such file, ConfigError when there are answers to something else.
    """
    read = partial(read_questions, prompts, params, origin)
    progress = Progress(total=count_lines(prompts), skipped=answers.check(read()) if answers.done else 0)
    return progress, _unanswered(read(), answers, tokenizer)


def _unanswered(
    questions: Iterable[Question | Answered], answers: AnswerFile, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[Line]:
    for question in questions:
        if isinstance(question, Answered):
            yield question
        elif question.id not in answers.done:
            yield as_prompt(question, tokenizer)


def run_offline(
    offline: OfflineEngine, prompts: Path, output: Path, params: SamplingParams, tell: Callable[[Progress], None]
) -> Progress:
    """Answer a file of prompts; run again after a stop, it goes on with what is missing.

    Raises:
        NotFoundError: no such prompts.
        EngineError: another process writes the answers.
        CorruptDataError: `output` holds something else.
        ConfigError: it holds answers of another model, other options or other prompts.
    """
    answers = AnswerFile(output)
    try:
        progress, lines = open_lines(prompts, answers, params, offline.origin, offline.tokenizer)
        tell(progress)
        before = offline.engine.drafted
        for answer in offline.answers(lines):
            answers.append([answer])
            progress.count(answer)
            progress.drafted = offline.engine.drafted.since(before)
            tell(progress)
    finally:
        answers.close()
    return progress
