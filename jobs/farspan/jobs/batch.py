"""A file of prompts answered by many engines on Ray: each is an actor, this process alone reads and writes files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import ray
import torch

from farspan.config.load import dump_config, parse_config
from farspan.config.schema import EngineConfig
from farspan.engine.answer_file import AnswerFile
from farspan.engine.draft import NO_GUESSES, DraftUse
from farspan.engine.offline import BLOCK_PROMPTS, OfflineEngine, Progress, in_blocks, in_groups, open_lines
from farspan.engine.origin import origin_of
from farspan.engine.prompts import Answered, Prompt
from farspan.engine.request import SamplingParams
from farspan.engine.shares import share_out
from farspan.errors import ClusterError, FarspanError
from farspan.models.address import fetch_model
from farspan.models.checkpoint import load_tokenizer

# Prompts of its share that an engine is given at a time: what is lost with it, and how often progress is told.
_CALL_PROMPTS = 64
_TRIES = 3
# An engine that answers none of its prompts for so long is stuck, not slow.
_DEADLINE_S = 6 * 3600.0


class _Worker:
    """One engine in a process of its own."""

    def __init__(self, model: str, config: str) -> None:
        settings = parse_config(EngineConfig, config)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self._offline = OfflineEngine.open(fetch_model(model), settings)

    def answer(self, prompts: list[Prompt]) -> tuple[list[Answered], DraftUse]:
        """The answers, and what came of guesses meanwhile."""
        before = self._offline.engine.drafted
        answers = list(self._offline.answers(prompts))
        return answers, self._offline.engine.drafted.since(before)


class _Crew:
    """Engines that come and go, and who works on what."""

    def __init__(self, model: str, config: EngineConfig, num_engines: int) -> None:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
        self._make = ray.remote(num_cpus=max(config.threads, 1), num_gpus=gpus)(_Worker)
        self._arguments = (model, dump_config(config))
        self._engines = [self._make.remote(*self._arguments) for _ in range(num_engines)]
        self.drafted = NO_GUESSES
        """What came of all guesses but those for prompts that were lost with their engine."""
        self._working: dict[ray.ObjectRef, tuple[int, list[Prompt], int]] = {}
        # What each engine has still to do of its share.
        self._rest: list[list[Prompt]] = [[] for _ in self._engines]

    def answers(self, shares: Iterator[list[Prompt]]) -> Iterator[list[Answered]]:
        """Each share is answered by one engine, in turns of some prompts, which come as soon as they are there.

        Raises:
            ClusterError: engines died over the same prompts again and again, or all of them are stuck. And what an
                engine raises.
        """
        for place in range(len(self._engines)):
            self._give(place, self._next(place, shares))
        while self._working:
            done, _ = ray.wait(list(self._working), num_returns=1, timeout=_DEADLINE_S)
            if not done:
                raise ClusterError(f"{len(self._working)} engines answered nothing in {_DEADLINE_S / 3600:g} hours")
            (ready,) = done
            place, prompts, tries = self._working.pop(ready)
            try:
                answers, drafted = ray.get(ready)
            except ray.exceptions.RayActorError as problem:
                if problem.actor_init_failed:
                    raise _cause(problem) from None
                if tries == _TRIES:
                    named = f"{prompts[0].id} .. {prompts[-1].id}"
                    raise ClusterError(f"{tries} engines died over the prompts {named}: {problem}") from None
                self._engines[place] = self._make.remote(*self._arguments)
                self._give(place, prompts, tries + 1)
                continue
            except ray.exceptions.RayError as problem:
                raise _cause(problem) from None
            self._give(place, self._next(place, shares))
            self.drafted += drafted
            yield answers

    def _next(self, place: int, shares: Iterator[list[Prompt]]) -> list[Prompt]:
        rest = self._rest[place] or next(shares, [])
        self._rest[place] = rest[_CALL_PROMPTS:]
        return rest[:_CALL_PROMPTS]

    def _give(self, place: int, prompts: list[Prompt], tries: int = 1) -> None:
        if prompts:
            self._working[self._engines[place].answer.remote(prompts)] = (place, prompts, tries)

    def dismiss(self) -> None:
        for engine in self._engines:
            ray.kill(engine)


def run_batch(
    model: str,
    config: EngineConfig,
    prompts: Path,
    output: Path,
    params: SamplingParams,
    num_engines: int,
    tell: Callable[[Progress], None],
) -> Progress:
    """`engine.offline.run_offline` with many engines, on the Ray this process is connected to.

    `model` must be readable from every node. Raises what that raises, and ClusterError.
    """
    answers = AnswerFile(output)
    crew = None
    try:
        folder = fetch_model(model)
        tokenizer = load_tokenizer(folder)
        progress, lines = open_lines(prompts, answers, params, origin_of(folder, config), tokenizer)
        tell(progress)

        def note(done: list[Answered]) -> None:
            answers.append(done)
            for answer in done:
                progress.count(answer)
            tell(progress)

        def shares() -> Iterator[list[Prompt]]:
            # A thousand for each engine: groups of so many prompts can stay whole.
            for block in in_blocks(lines, BLOCK_PROMPTS * num_engines):
                if refused := [line for line in block if isinstance(line, Answered)]:
                    note(refused)
                yield from share_out(in_groups([line for line in block if isinstance(line, Prompt)]), num_engines)

        crew = _Crew(model, config, num_engines)
        for done in crew.answers(shares()):
            progress.drafted = crew.drafted
            note(done)
    finally:
        if crew is not None:
            crew.dismiss()
        answers.close()
    return progress


def _cause(problem: BaseException) -> FarspanError:
    """Our own error out of the layers Ray wraps around it."""
    seen: BaseException | None = problem
    while seen is not None:
        if isinstance(seen, FarspanError) and not isinstance(seen, ray.exceptions.RayError):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    return ClusterError(f"an engine on Ray failed: {str(problem).strip().splitlines()[-1]}; look at Ray's logs")
