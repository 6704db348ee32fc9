"""A token for each row of logits in plain torch. Contract and letters: contract.py."""

from __future__ import annotations

import torch
from torch import Tensor

from farspan.kernels.sampling.contract import Chosen, Draws
from farspan.kernels.sampling.cuts import Cuts, Part


def sample_reference(logits_NV: Tensor, draws: Draws, points_N: Tensor, told_N: Tensor | None = None) -> Chosen:
    best_N, tokens_N = logits_NV.max(-1)
    margin_N = torch.full_like(points_N, torch.inf)
    drawn_S = (draws.temperature_N > 0).nonzero()[:, 0]
    if len(drawn_S):
        scores_SV = logits_NV[drawn_S].double()
        cut_SV = _cuts(draws, drawn_S, logits_NV.shape[-1]).apply(scores_SV)
        tokens_N[drawn_S] = draw(cut_SV, points_N[drawn_S])
        cumulative_SV = cut_SV.softmax(-1).cumsum(-1)
        point_S1 = (points_N[drawn_S] * cumulative_SV[:, -1])[:, None]
        # From the beginning of the first token too.
        margin_N[drawn_S] = torch.minimum((cumulative_SV - point_S1).abs().amin(-1), point_S1[:, 0])
    lse_N = None if told_N is None else logits_NV.double().logsumexp(-1)
    return Chosen(tokens_N, best_N, margin_N, lse_N)


def draw(scores_NV: Tensor, points_N: Tensor) -> Tensor:
    """Tokens [N] by the inverse of the cumulative distribution, in the order of the vocabulary.

    Scores are fp64: the running sum over a large vocabulary must not lose the tail.
    """
    cumulative_NV = scores_NV.softmax(-1).cumsum(-1)
    total_N1 = cumulative_NV[:, -1:]
    # Below the total also after rounding, so that the token found always has a probability.
    points_N1 = torch.minimum(points_N[:, None] * total_N1, torch.nextafter(total_N1, torch.zeros_like(total_N1)))
    tokens_N = torch.searchsorted(cumulative_NV, points_N1, right=True)[:, 0]
    # A row of NaN finds the end; its token is not used.
    return tokens_N.clamp(max=scores_NV.shape[-1] - 1)


def _cuts(draws: Draws, rows_S: Tensor, vocab_size: int) -> Cuts:
    top_k_S, top_p_S, least_S = (x[rows_S] for x in (draws.top_k_N, draws.top_p_N, draws.least_N))
    return Cuts(
        draws.temperature_N[rows_S, None],
        _part(top_k_S, (top_k_S > 0) & (top_k_S < vocab_size)),
        _part(top_p_S, top_p_S < 1),
        _part(least_S, least_S > -torch.inf),
    )


def _part(values_S: Tensor, there_S: Tensor) -> Part | None:
    rows = there_S.nonzero()[:, 0]
    return Part(rows, values_S[rows, None], float(values_S[rows].max())) if len(rows) else None
