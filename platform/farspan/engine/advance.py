"""From the logits of an iteration to the tokens of its sequences, one or, with drafts, several. R rows, V vocabulary.

A draft is checked by choosing each token as if there were none: it is right as long as the chosen tokens are the
drafted ones. What comes out is therefore, token for token, what comes out without drafts, also when sampled.
Source: the coupling of drafts and samples by shared randomness (Daliri, Musco, Suresh 2024,
https://arxiv.org/abs/2408.07978).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from farspan.engine.logprobs import token_logprobs
from farspan.engine.request import SequenceState, TokenEvent
from farspan.engine.runner import Piece
from farspan.engine.sampler import Choice, SampleRow, choose_tokens
from farspan.errors import RequestError


@dataclass(frozen=True, slots=True)
class Ends:
    """Where an answer ends, whoever asks."""

    eos_token_ids: frozenset[int]
    max_context_tokens: int

    def of(self, sequence: SequenceState) -> End:
        params = sequence.params
        stops = params.stop_token_ids if params.ignore_eos else params.stop_token_ids | self.eos_token_ids
        return End(stops, min(self.max_context_tokens, sequence.num_prompt + params.max_tokens))


@dataclass(frozen=True, slots=True)
class End:
    """Where one answer ends."""

    stops: frozenset[int]
    full: int
    """Tokens of the prompt and the longest answer."""


@dataclass(slots=True)
class Advanced:
    """What one sequence got in an iteration."""

    sequence: SequenceState
    events: list[TokenEvent] = field(default_factory=list)
    problem: str | None = None
    """Why it cannot go on."""

    @property
    def finished(self) -> bool:
        return bool(self.events) and self.events[-1].finish is not None


@dataclass(frozen=True, slots=True)
class Computed:
    """What an iteration has computed of one sequence."""

    sequence: SequenceState
    rows: range
    """Its logits, from which tokens are chosen; none while its prompt is not over."""
    sound: bool
    """Whether its last logits, or those that guesses are checked by, are numbers."""


def take_rows(sequences: Sequence[SequenceState], pieces: Sequence[Piece], logits_RV: Tensor) -> list[Computed]:
    """Whose logits are whose. What was asked about tokens of prompts is kept, and counted what is computed."""
    # Where a token is chosen, soundness is found with it; guesses and parts of prompts are looked at here.
    ahead = any(
        sequence.draft or sequence.num_computed + len(piece.tokens) < len(sequence.tokens)
        for sequence, piece in zip(sequences, pieces, strict=True)
    )
    sound_R = sound_rows(logits_RV) if ahead else [True] * len(logits_RV)
    found: list[Computed] = []
    end = 0
    for sequence, piece in zip(sequences, pieces, strict=True):
        if wants_prompt_logprobs(sequence):
            collect_prompt_logprobs(sequence, piece.past, logits_RV[end : end + piece.num_logits])
        end += piece.num_logits
        sequence.num_computed += len(piece.tokens)
        if sequence.num_computed >= len(sequence.tokens):
            rows = range(end - 1 - len(sequence.draft), end)
            found.append(Computed(sequence, rows, all(sound_R[rows.start : end])))
        else:
            found.append(Computed(sequence, range(0), sound_R[end - 1]))
    return found


def advance(
    sequences: Sequence[SequenceState], first_rows: Sequence[int], logits_RV: Tensor, ends: Ends
) -> list[Advanced]:
    """Choose the next token of each sequence, and the one after each draft token that was right.

    The logits of a sequence are the rows from its first row on, one more than it has draft tokens.
    """
    results = [Advanced(sequence) for sequence in sequences]
    live = list(range(len(sequences)))
    depth = 0
    while live:
        picked = [first_rows[i] + depth for i in live]
        whole = picked == list(range(len(logits_RV)))
        logits_NV = logits_RV if whole else logits_RV[torch.tensor(picked, device=logits_RV.device)]
        rows = [_row(sequences[i]) for i in live]
        choices = choose_tokens(logits_NV, rows, ends.eos_token_ids)
        live = [i for i, choice in zip(live, choices, strict=True) if _take(results[i], choice, depth, ends)]
        depth += 1
    return results


def collect_prompt_logprobs(sequence: SequenceState, past: int, logits_RV: Tensor) -> None:
    """Keep the log-probabilities of prompt tokens, given the logits of the tokens from `past` on."""
    known = sequence.prompt_logprobs
    # Row i belongs to the token after past + i. Those known already were computed before a preemption.
    first = len(known) - past
    last = min(len(logits_RV), sequence.num_prompt - 1 - past)
    if not 0 <= first < last:
        return
    tokens = sequence.tokens[past + first + 1 : past + last + 1]
    wanted = [sequence.params.prompt_logprobs] * len(tokens)
    known += [found for found in token_logprobs(logits_RV[first:last], tokens, wanted) if found is not None]


def sound_rows(logits_RV: Tensor) -> list[bool]:
    """The largest logit of a row is NaN or infinite where any is NaN or all are; one look for all rows."""
    return [math.isfinite(high) for high in logits_RV.amax(dim=-1).tolist()]


def wants_prompt_logprobs(sequence: SequenceState) -> bool:
    """Whether every prompt token must be computed here, and its logits kept."""
    return sequence.params.prompt_logprobs is not None and sequence.num_answered == 0


def _row(sequence: SequenceState) -> SampleRow:
    return SampleRow(sequence.params, len(sequence.tokens), sequence.num_answered, sequence.history)


def _take(result: Advanced, choice: Choice, depth: int, ends: Ends) -> bool:
    """Give a sequence its token. Whether the next row of logits is its too."""
    sequence = result.sequence
    if choice.problem is not None:
        result.problem = choice.problem
        return False
    prompt_logprobs = tuple(sequence.prompt_logprobs) if wants_prompt_logprobs(sequence) else None
    try:
        finish = accept(sequence, choice.token, ends.of(sequence))
    except RequestError as problem:
        result.problem = problem.reason
        return False
    found, began_s = sequence.num_found, sequence.began_s
    result.events.append(
        TokenEvent(sequence.request_id, choice.token, finish, choice.logprobs, prompt_logprobs, found, began_s)
    )
    return finish is None and depth < len(sequence.draft) and sequence.draft[depth] == choice.token


def accept(sequence: SequenceState, token: int, end: End) -> str | None:
    """Append a token; how the answer ends with it, if it does."""
    sequence.tokens.append(token)
    if sequence.history is not None:
        may_end = sequence.num_answered >= sequence.params.min_tokens
        if sequence.history.accept(token, may_end):
            return "stop"
    if token in end.stops:
        return "stop"
    return "length" if len(sequence.tokens) >= end.full else None
