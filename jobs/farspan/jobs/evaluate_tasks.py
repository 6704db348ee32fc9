"""Questions about a fact hidden in real text: passkey, needle, variables. Pure: the seed decides everything.

A prompt has exactly the tokens it is asked for: text of the corpus, the facts at their depths, the question at the
end, and room for the answer. An answer counts when its first word is exactly the one that was hidden.
Sources: passkey retrieval (Mohtashami & Jaggi 2023, https://arxiv.org/abs/2305.16300); needles with distractors and
variable tracking as in RULER (Hsieh et al. 2024, https://arxiv.org/abs/2404.06654).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from farspan.errors import ConfigError

TASKS = ("passkey", "needle", "variables")
_PLACES = ("Amber", "Birch", "Cedar", "Delta", "Ember", "Fjord", "Grove", "Haven", "Islet", "Juniper")
_NEEDLES = 4
_HOPS = 3
# Words a greedy model may put before it ends the answer.
_SPARE_TOKENS = 4
# How far a fact may move to begin a line of the text around it.
_NEAREST_LINE = 64


@dataclass(frozen=True, slots=True)
class Question:
    """`prompt` in tokens; `answer` is one word; at most `answer_tokens` are asked for."""

    prompt: tuple[int, ...]
    answer: str
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class Recall:
    """How many of `samples` questions were answered right; `depth` 0 is the beginning of the text, 1 its end."""

    task: str
    length: int
    depth: float
    correct: int
    samples: int


Answer = Callable[[Sequence[Question]], list[list[int]]]
"""Who answers: the tokens of each answer, greedy."""


def make_question(task: str, length: int, depth: float, sample: int, seed: int, filler: Filler) -> Question:
    """Question number `sample` of its kind; prompt and answer have `length` tokens together.

    Raises:
        ConfigError: a length without room for the facts.
    """
    rng = random.Random(f"{seed} {task} {length} {depth} {sample}")
    facts, ending, answer = _WRITERS[task](rng, depth)
    hidden = [(place, filler.encode(fact)) for place, fact in facts]
    question = filler.encode(ending)
    answer_tokens = len(filler.encode(f" {answer}")) + _SPARE_TOKENS
    room = length - answer_tokens - len(question) - sum(len(tokens) for _, tokens in hidden)
    if room < 1:
        raise ConfigError("--lengths", f"must leave room for the facts of {task}", length, f"use {length - room + 64}")
    text = filler.text(rng, room)
    return Question((*_hide(text, hidden, filler), *question), answer, answer_tokens)


def is_right(question: Question, text: str) -> bool:
    """Whether the first word of an answer is the hidden one."""
    found = re.search(r"\w+", text)
    return found is not None and found.group() == question.answer


class Filler:
    """Real text to hide facts in: the tokens of a corpus, and its tokenizer."""

    def __init__(self, tokenizer: Any, sequence: Callable[[int], Sequence[int]], eos: int) -> None:
        """`sequence(n)` are consecutive tokens of the corpus, for every n from 0."""
        self._tokenizer = tokenizer
        self._sequence = sequence
        self._eos = eos

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def text(self, rng: random.Random, num_tokens: int) -> list[int]:
        """Tokens of the corpus from somewhere on, without the ends of documents."""
        number, found = rng.randrange(1 << 20), list[int]()
        while len(found) < num_tokens:
            found += [token for token in self._sequence(number) if token != self._eos]
            number += 1
        return found[:num_tokens]

    def ends_line(self, token: int) -> bool:
        return self.decode([token]).endswith("\n")


def score(
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int,
    filler: Filler,
    answer: Answer,
    tell: Callable[[str], None],
) -> tuple[Recall, ...]:
    """Ask every question of every task, length and depth."""
    rows = []
    for task in tasks:
        for length in lengths:
            for depth in depths:
                questions = [make_question(task, length, depth, sample, seed, filler) for sample in range(samples)]
                answers = answer(questions)
                right = sum(is_right(q, filler.decode(tokens)) for q, tokens in zip(questions, answers, strict=True))
                rows.append(Recall(task, length, depth, right, samples))
                tell(f"{task}, {length} tokens, depth {depth:.2f}: {right} of {samples}")
    return tuple(rows)


def _hide(text: list[int], hidden: Sequence[tuple[float, list[int]]], filler: Filler) -> list[int]:
    """The text with each fact at its depth, moved to the nearest earlier end of a line."""
    found: list[int] = []
    done = 0
    for depth, tokens in sorted(hidden, key=lambda entry: entry[0]):
        place = max(done, _line_end(text, round(depth * len(text)), filler))
        found += [*text[done:place], *tokens]
        done = place
    return found + text[done:]


def _line_end(text: list[int], place: int, filler: Filler) -> int:
    for candidate in range(place, max(place - _NEAREST_LINE, 0), -1):
        if filler.ends_line(text[candidate - 1]):
            return candidate
    return place


Facts = tuple[list[tuple[float, str]], str, str]
"""((depth, sentence) of each fact, how the question begins its answer, the answer)."""


def _passkey(rng: random.Random, depth: float) -> Facts:
    key = str(rng.randrange(10_000, 100_000))
    fact = f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
    return [(depth, fact)], "\nWhat is the pass key? The pass key is", key


def _needle(rng: random.Random, depth: float) -> Facts:
    places = rng.sample(_PLACES, _NEEDLES)
    numbers = [str(number) for number in rng.sample(range(100_000, 1_000_000), _NEEDLES)]
    depths = [depth, *(rng.random() for _ in range(_NEEDLES - 1))]
    facts = [
        (where, f"\nThe magic number of {place} is {number}.\n")
        for where, place, number in zip(depths, places, numbers, strict=True)
    ]
    return facts, f"\nThe magic number of {places[0]} is", numbers[0]


def _variables(rng: random.Random, depth: float) -> Facts:
    """One chain that is asked for, from `depth` to the end of the text, and one that is not."""
    names = [f"V{number}" for number in rng.sample(range(100, 1000), 2 * (_HOPS + 1))]
    values = [str(value) for value in rng.sample(range(10_000, 100_000), 2)]
    facts = []
    for chain, value in enumerate(values):
        held = names[chain * (_HOPS + 1) : (chain + 1) * (_HOPS + 1)]
        begin = depth if chain == 0 else rng.random()
        for hop, name in enumerate(held):
            source = value if hop == 0 else held[hop - 1]
            facts.append((begin + (1 - begin) * hop / (_HOPS + 1), f"\n{name} = {source}\n"))
    return facts, f"\nThe value of {names[_HOPS]} is", values[0]


_WRITERS: dict[str, Callable[[random.Random, float], Facts]] = {
    "passkey": _passkey,
    "needle": _needle,
    "variables": _variables,
}
