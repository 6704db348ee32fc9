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

from farspan.engine.history import History
from farspan.engine.logprobs import token_logprobs
from farspan.engine.philox import uniforms, uniforms_of, words_of
from farspan.engine.request import SamplingParams, TokenLogprobs
from farspan.engine.steer import steer
from farspan.engine.warp import Warp, send
from farspan.kernels.team.quiet import on_one_thread

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
    best_N, tokens_N = _best(scores_NV)
    sampled = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if sampled:
        drawn = [rows[i] for i in sampled]
        keys = [_key(row.params, row.position) for row in drawn]
        index = send(sampled, torch.long, scores_NV.device)
        points_S = send(np.asarray(uniforms(keys)), torch.float64, scores_NV.device)
        scores_SV = scores_NV[index].double()
        tokens_N[index] = _draw(scores_SV, Warp.of([row.params for row in drawn], scores_SV), points_S)
    highest_N = best_N if scores_NV is logits_NV else logits_NV.amax(-1)
    # One transfer from the device: the token, whether the model computed numbers, whether anything is allowed.
    found = torch.stack([x_N.double() for x_N in (tokens_N, highest_N, best_N)]).tolist()
    tokens = [int(token) for token in found[0]]
    problems = [_problem(math.isfinite(high), best > -math.inf) for high, best in zip(*found[1:], strict=True)]
    logprobs = token_logprobs(logits_NV, tokens, [row.params.logprobs for row in rows])
    return [Choice(*parts) for parts in zip(tokens, logprobs, problems, strict=True)]


def _best(scores_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The highest score of each row, and its token; NaN where there is any."""
    if scores_NV.device.type != "cpu":
        # One look instead of two.
        best_N, tokens_N = scores_NV.max(-1)
        return best_N, tokens_N
    # The same token: widening changes no order, and numpy looks through a row several times faster than torch.
    with on_one_thread():
        scores_nv = (scores_NV if scores_NV.element_size() >= 4 else scores_NV.float()).numpy()
    tokens_n = scores_nv.argmax(-1)
    best_n = np.take_along_axis(scores_nv, tokens_n[:, None], -1)[:, 0]
    return torch.from_numpy(best_n), torch.from_numpy(tokens_n)


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) of one token of a request that is its seed's only one."""
    return float(uniforms([(seed, 0, 0, position)])[0])


def _key(params: SamplingParams, position: int) -> tuple[int, int, int, int]:
    """All that the random number of a token depends on."""
    return params.seed, params.request, params.choice, position


def _draw(scores_NV: Tensor, warp: Warp, points_N: Tensor) -> Tensor:
    """Tokens [N] by the inverse of the cumulative distribution, in the order of the vocabulary.

    Scores are fp64: the running sum over a large vocabulary must not lose the tail.
    """
    cumulative_NV = warp.apply(scores_NV).softmax(-1).cumsum(-1)
    total_N1 = cumulative_NV[:, -1:]
    # Below the total also after rounding, so that the token found always has a probability.
    points_N1 = torch.minimum(points_N[:, None] * total_N1, torch.nextafter(total_N1, torch.zeros_like(total_N1)))
    tokens_N = torch.searchsorted(cumulative_NV, points_N1, right=True)[:, 0]
    # A row of NaN finds the end; its token is not used.
    return tokens_N.clamp(max=scores_NV.shape[-1] - 1)


class SteadyChoice:
    """The choice of the same rows in one step after another, where logits and random numbers are all it takes.

    Gives the tokens that `choose_tokens` gives. Nothing waits for the device, but where a row has top_p.
    """

    def __init__(self, params: Sequence[SamplingParams], positions: Sequence[int], logits_NV: Tensor) -> None:
        """`positions`: those of the tokens that are chosen first. The logits are only looked at for their shape."""
        self._device = logits_NV.device
        sampled = [i for i, each in enumerate(params) if each.temperature > 0]
        self._rows_S = send(sampled, torch.long, self._device) if sampled else None
        self._words_S4 = words_of([_key(params[i], positions[i]) for i in sampled])
        self._warp = Warp.of([params[i] for i in sampled], logits_NV.new_empty(0, logits_NV.shape[-1]).double())
        self._points: list[Tensor] = []

    def choose(self, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """(token, highest logit) of each row, on its device."""
        best_N, tokens_N = _best(logits_NV)
        if self._rows_S is not None:
            scores_SV = logits_NV[self._rows_S].double()
            tokens_N[self._rows_S] = _draw(scores_SV, self._warp, self._next_points())
        return tokens_N, best_N

    def _next_points(self) -> Tensor:
        if not self._points:
            # For many steps at once: what numpy takes hardly depends on how many numbers there are.
            words_K4 = np.tile(self._words_S4, (_STEPS_DRAWN, 1, 1))
            words_K4[:, :, 3] += np.arange(_STEPS_DRAWN, dtype=np.uint64)[:, None]
            self._words_S4[:, 3] += np.uint64(_STEPS_DRAWN)
            points = uniforms_of(words_K4.reshape(-1, 4)).reshape(_STEPS_DRAWN, -1)
            self._points = list(send(points, torch.float64, self._device).unbind())[::-1]
        return self._points.pop()


def _problem(finite: bool, allowed: bool) -> str | None:
    if not finite:
        return UNSOUND
    return None if allowed else "no token is allowed here: grammar, min_tokens and logit_bias exclude each other"
