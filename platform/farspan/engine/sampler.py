"""Logits to tokens, a batch of rows at once. N rows, V vocabulary.

The random number of a token depends on (seed, request, choice, position) alone, and a row's token on nothing but that
number, its logits and its own history: a request goes on anywhere with the same tokens, whoever is beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from farspan.engine.drawing import Drawing, lse_of
from farspan.engine.history import History
from farspan.engine.logprobs import token_logprobs
from farspan.engine.philox import uniforms, uniforms_of, words_of
from farspan.engine.request import SamplingParams, TokenLogprobs
from farspan.engine.steer import steer
from farspan.engine.warp import send

# Random numbers of rows that stay the same are made for so many steps at once.
_STEPS_DRAWN = 32

UNSOUND = "the model computed NaN or infinite logits for this prompt"


@dataclass(frozen=True, slots=True)
class SampleRow:
    """Whose token is chosen: the one at `position` of the sequence, after `num_answered` tokens of the answer."""

    params: SamplingParams
    position: int
    num_answered: int
    history: History | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, or why there is none."""

    token: int
    logprobs: TokenLogprobs | None = None
    problem: str | None = None


def choose_tokens(logits_NV: Tensor, rows: Sequence[SampleRow], eos_token_ids: frozenset[int]) -> list[Choice]:
    """One token for each row of logits."""
    logits_NV = logits_NV.detach()
    scores_NV = steer(logits_NV, rows, eos_token_ids)
    plain = scores_NV is logits_NV
    drawing = Drawing([row.params for row in rows], scores_NV)
    points_N = None
    if drawing.draws:
        points = uniforms([_key(row.params, row.position) for row in rows])
        points_N = send(points, torch.float64, scores_NV.device)
    # Of these the log-probability of the token is wanted and no other: as the model says, not what was made of it.
    told = [i for i, row in enumerate(rows) if row.params.logprobs == 0]
    chosen = drawing.choose(scores_NV, points_N, told if plain else ())
    lse_N = chosen.lse_N if plain else lse_of(logits_NV, told)
    # One transfer from the device: the token, whether the model computed numbers, whether anything is allowed.
    found = [chosen.tokens_N, chosen.best_N if plain else logits_NV.amax(-1), chosen.best_N]
    if lse_N is not None:
        found.append(logits_NV.gather(-1, chosen.tokens_N[:, None])[:, 0].double() - lse_N)
    told_KN = torch.stack([x_N.double() for x_N in found]).tolist()
    tokens = [int(token) for token in told_KN[0]]
    highs = zip(rows, *told_KN[1:3], strict=True)
    problems = [_problem(row, math.isfinite(high), best > -math.inf) for row, high, best in highs]
    num_top = [row.params.logprobs for row in rows]
    if lse_N is None:
        logprobs = token_logprobs(logits_NV, tokens, num_top)
    else:
        logprobs = token_logprobs(logits_NV, tokens, [count or None for count in num_top])
        for i in told:
            logprobs[i] = TokenLogprobs(tokens[i], told_KN[3][i], ())
    return [Choice(*parts) for parts in zip(tokens, logprobs, problems, strict=True)]


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) of one token of a request that is its seed's only one."""
    return float(uniforms([(seed, 0, 0, position)])[0])


def _key(params: SamplingParams, position: int) -> tuple[int, int, int, int]:
    """All that the random number of a token depends on."""
    return params.seed, params.request, params.choice, position


class SteadyChoice:
    """The choice of the same rows in one step after another, where logits and random numbers are all it takes.

    Gives the tokens that `choose_tokens` gives. Nothing waits for the device, but where a row has top_p.
    """

    def __init__(self, params: Sequence[SamplingParams], positions: Sequence[int], logits_NV: Tensor) -> None:
        """`positions`: those of the tokens that are chosen first. The logits are only looked at for their shape."""
        self._device = logits_NV.device
        self._drawing = Drawing(params, logits_NV)
        keys = [_key(each, position) for each, position in zip(params, positions, strict=True)]
        self._words_N4 = words_of(keys)
        self._points: list[Tensor] = []

    def choose(self, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """(token, highest logit) of each row, on its device."""
        chosen = self._drawing.choose(logits_NV, self._next_points() if self._drawing.draws else None)
        return chosen.tokens_N, chosen.best_N

    def _next_points(self) -> Tensor:
        if not self._points:
            # For many steps at once: what numpy takes hardly depends on how many numbers there are.
            words_K4 = np.tile(self._words_N4, (_STEPS_DRAWN, 1, 1))
            words_K4[:, :, 3] += np.arange(_STEPS_DRAWN, dtype=np.uint64)[:, None]
            self._words_N4[:, 3] += np.uint64(_STEPS_DRAWN)
            points = uniforms_of(words_K4.reshape(-1, 4)).reshape(_STEPS_DRAWN, -1)
            self._points = list(send(points, torch.float64, self._device).unbind())[::-1]
        return self._points.pop()


def _problem(row: SampleRow, finite: bool, allowed: bool) -> str | None:
    if not finite:
        return UNSOUND
    return None if allowed else f"no token is allowed here by {_what_forbids(row)}; leave one of them out"


def _what_forbids(row: SampleRow) -> str:
    """The fields of a row without which more would be allowed."""
    params = row.params
    fields = {
        "grammar": params.grammar is not None,
        "min_tokens": row.num_answered < params.min_tokens,
        "allowed_token_ids": bool(params.allowed_token_ids),
        "bad_words": bool(params.bad_words),
        "logit_bias": bool(params.logit_bias),
    }
    return ", ".join(field for field, asked in fields.items() if asked)
