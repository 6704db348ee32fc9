"""What the engine is asked, and what it answers."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from farspan.engine.terms import PLAIN_TERMS, Terms
from farspan.errors import FarspanError
from farspan.kv.offload import OffloadedPages
from farspan.kv.prefix import PrefixChain

if TYPE_CHECKING:
    from farspan.engine.history import History

GrammarKind = Literal["json_schema", "json_object", "regex", "lark"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like. `source` is a JSON schema, a regular expression or a Lark grammar, as text."""

    kind: GrammarKind
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen, and when to stop."""

    max_tokens: int = 16
    min_tokens: int = 0
    """Nothing ends the answer before it has so many tokens, except a grammar that is complete."""
    temperature: float = 0.0
    """0: always the most likely token."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0
    """Least probability of a token, relative to the most likely one."""
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt or answer are divided by it (multiplied where negative)."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token of the answer."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token once for each time it was answered."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit) pairs."""
    allowed_token_ids: frozenset[int] = frozenset()
    """No other token is chosen, ends of the answer included; none: all are."""
    bad_words: tuple[str, ...] = ()
    """Words that the answer does not have; see words.py. The engine needs a tokenizer for them."""
    seed: int = 0
    request: int = 0
    """Tells requests of one seed apart, as the prompts of a batch."""
    n: int = 1
    """Answers to the same prompt; the engine answers each as a request of its own, see `choices`."""
    choice: int = 0
    """Which of the n answers this is. With seed, request and position all that a random number depends on."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; the engine needs a tokenizer for them."""
    include_stop_str_in_output: bool = False
    """The text ends with the stop string that ended it, not before. Changes no token."""
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    """For each answered token its log-probability, and those of so many most likely tokens; none: not computed."""
    prompt_logprobs: int | None = None
    """The same for each prompt token after the first."""
    grammar: Grammar | None = None


def choices(request_id: str, params: SamplingParams) -> list[tuple[str, SamplingParams]]:
    """(id, parameters) of each answer a request asks for."""
    if params.n == 1:
        return [(request_id, params)]
    return [(f"{request_id}/{i}", replace(params, n=1, choice=i)) for i in range(params.n)]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely the model itself found a token: before temperature, penalties, bias and grammar."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token, log-probability), most likely first."""


# So long a request may be passed by others of its tenant that have to be answered sooner.
_PATIENCE_S = 30.0


@dataclass(slots=True, eq=False)
class SequenceState:
    """A request while the engine works on it: `tokens` is the prompt and every token chosen so far."""

    request_id: str
    tokens: list[int]
    num_prompt: int
    params: SamplingParams
    arrival: int
    """Position in the order of arrival: the oldest is never preempted for a younger one."""
    prefill_only: bool = False
    """Stop after the first token and keep the pages for a ticket."""
    pages: array[int] = field(default_factory=lambda: array("q"))
    """Its table: a page of each group for every `page_tokens` tokens (kv/layout.py), as a tensor can be made of it."""
    num_gone: int = 0
    """Pages of the table that are gone."""
    num_computed: int = 0
    """Tokens whose keys and values are in the pages."""
    state_pages: list[int] = field(default_factory=list)
    """Pages in which its recurrent state arrived, or waits for a ticket."""
    preemptions: int = 0
    history: History | None = None
    """What the sampler remembers of the tokens; rebuilt from them wherever the request goes on."""
    draft: list[int] = field(default_factory=list)
    """Guessed tokens after `tokens`, checked in this iteration."""
    may_draft: bool = True
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    terms: Terms = PLAIN_TERMS
    last_step: int = 0
    """The iteration it was last computed in, or came in."""
    chain: PrefixChain | None = None
    """Names of its pages, for the prefix cache."""
    kept: OffloadedPages | None = None
    """Its `num_computed` tokens, and its state, in host memory, while it holds no pages."""
    num_found: int = 0
    """Tokens of the prompt that an earlier request had computed."""
    began_s: float = 0.0
    """When its first tokens were computed here, by the clock of the engine; 0: not yet."""
    arrived_s: float = 0.0
    """By the same clock."""

    @property
    def due_s(self) -> float:
        """Of those that wait for one tenant, the one that is due first goes first.

        Deadlines count while they are near: after a while nobody who comes later is due before.
        """
        patient_s = self.arrived_s + _PATIENCE_S
        return patient_s if self.terms.deadline_s is None else min(self.terms.deadline_s, patient_s)

    @property
    def num_answered(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def rank(self) -> tuple[int, int]:
        """The first in this order is never preempted for another."""
        return -self.terms.priority, self.arrival


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token was chosen.

    `finish` is None, "stop" (end of text, a stop token or string, the end of the grammar) or "length".
    """

    request_id: str
    token: int
    finish: str | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    """With the first token, where they were asked for."""
    num_found: int = 0
    """Tokens of the prompt that an earlier request had computed."""
    began_s: float = field(default=0.0, compare=False)
    """When the engine took the request up, by its clock."""


@dataclass(frozen=True, slots=True)
class FailedEvent:
    """A request ends without an answer; the others go on."""

    request_id: str
    error: FarspanError


Event = TokenEvent | FailedEvent


@dataclass(frozen=True, slots=True)
class Completion:
    """One whole answer to one prompt."""

    tokens: tuple[int, ...]
    finish: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


def whole_answer(events: Sequence[TokenEvent]) -> Completion:
    """All events of one finished request, put together."""
    last = events[-1]
    assert last.finish is not None, "the request is not finished"
    logprobs = tuple(event.logprobs for event in events if event.logprobs is not None)
    return Completion(tuple(event.token for event in events), last.finish, logprobs, events[0].prompt_logprobs or ())
