"""What the engine is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from farspan.engine.terms import PLAIN_TERMS, Terms
from farspan.errors import FarspanError, RequestError
from farspan.kv.offload import OffloadedPages
from farspan.kv.prefix import PrefixChain


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen, and when to stop.

    Stop strings are not here: the engine knows tokens only, whoever turns them into text ends the request.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    """0: always the most likely token."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    seed: int = 0
    """With the position of a token, all that its random number depends on."""
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False


@dataclass(slots=True)
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
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Tokens whose keys and values are in the pages."""
    preemptions: int = 0
    terms: Terms = PLAIN_TERMS
    last_step: int = 0
    """The iteration it was last computed in, or came in."""
    chain: PrefixChain | None = None
    """Names of its pages, for the prefix cache."""
    kept: OffloadedPages | None = None
    """Its `num_computed` tokens in host memory, while it holds no pages."""
    num_found: int = 0
    """Tokens of the prompt that an earlier request had computed."""

    @property
    def num_answered(self) -> int:
        return len(self.tokens) - self.num_prompt


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token was chosen. `finish` is None, "stop" (end of text, stop token) or "length"."""

    request_id: str
    token: int
    finish: str | None


@dataclass(frozen=True, slots=True)
class FailedEvent:
    """A request ends without an answer; the others go on."""

    request_id: str
    error: FarspanError


Event = TokenEvent | FailedEvent


@dataclass(frozen=True, slots=True)
class Completion:
    """The whole answer to one prompt."""

    tokens: tuple[int, ...]
    finish: str


def check_prompt(request_id: str, tokens: list[int], num_prompt: int, params: SamplingParams, vocab_size: int) -> None:
    """Raises RequestError when the request can never be answered, whatever the load."""

    def refuse(reason: str) -> None:
        raise RequestError(request_id, reason)

    if num_prompt < 1:
        refuse("the prompt is empty; give at least one token")
    if outside := [token for token in tokens if not 0 <= token < vocab_size]:
        refuse(f"token {outside[0]} is outside the vocabulary 0..{vocab_size - 1}")
    if params.max_tokens < 1:
        refuse(f"max_tokens must be at least 1, got {params.max_tokens}")
    if not 0 <= params.temperature < float("inf"):
        refuse(f"temperature must be 0 or more, got {params.temperature}")
    if not 0 < params.top_p <= 1:
        refuse(f"top_p must lie in (0, 1], got {params.top_p}")
    if params.top_k < 0:
        refuse(f"top_k must be 0 (all) or more, got {params.top_k}")
