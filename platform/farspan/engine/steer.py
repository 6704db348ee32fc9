"""Logits changed by what a request asks for and by the tokens so far. N rows, S rows of one kind, V vocabulary.

In this order: bias, repetition, presence and frequency penalties, then what is forbidden (ends before min_tokens,
tokens outside the grammar or those that are allowed, last tokens of bad words).
Source: repetition penalty as in CTRL (Keskar et al. 2019, https://arxiv.org/abs/1909.05858).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from farspan.engine.grammar import allowed_tokens

if TYPE_CHECKING:
    from farspan.engine.sampler import SampleRow


def steer(logits_NV: Tensor, rows: Sequence[SampleRow], eos_token_ids: frozenset[int]) -> Tensor:
    """The changed logits; the very same tensor where no row asks for a change."""
    biased = [i for i, row in enumerate(rows) if row.params.logit_bias]
    counted = [i for i, row in enumerate(rows) if row.history and row.history.counts]
    early = [i for i, row in enumerate(rows) if row.num_answered < row.params.min_tokens]
    guided = [i for i, row in enumerate(rows) if row.history and row.history.matcher]
    bound = [i for i, row in enumerate(rows) if row.history and row.history.allowed]
    worded = [i for i, row in enumerate(rows) if row.history and row.history.words]
    if not (biased or counted or early or guided or bound or worded):
        return logits_NV
    scores_NV = logits_NV.clone() if logits_NV.element_size() >= 4 else logits_NV.float()
    if biased:
        _add_bias(scores_NV, rows, biased)
    if counted:
        index = torch.tensor(counted, device=scores_NV.device)
        scores_NV[index] = penalize(scores_NV[index], [rows[i] for i in counted])
    if early:
        _forbid_ends(scores_NV, rows, early, eos_token_ids)
    if guided:
        _keep_to_grammar(scores_NV, rows, guided)
    if bound:
        _keep_to_allowed(scores_NV, rows, bound)
    if worded:
        _forbid_words(scores_NV, rows, worded)
    return scores_NV


def penalize(scores_SV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Penalties of rows that all have counts."""
    counts = [row.history.counts for row in rows if row.history and row.history.counts]
    answered_SV = torch.stack([count.answered_V for count in counts])
    seen_SV = torch.stack([count.seen_V for count in counts])
    repetition_S1, presence_S1, frequency_S1 = (
        torch.tensor(values, dtype=scores_SV.dtype, device=scores_SV.device)[:, None]
        for values in (
            [row.params.repetition_penalty for row in rows],
            [row.params.presence_penalty for row in rows],
            [row.params.frequency_penalty for row in rows],
        )
    )
    punished_SV = torch.where(scores_SV < 0, scores_SV * repetition_S1, scores_SV / repetition_S1)
    scores_SV = torch.where(seen_SV, punished_SV, scores_SV)
    return scores_SV - frequency_S1 * answered_SV - presence_S1 * (answered_SV > 0)


def _add_bias(scores_NV: Tensor, rows: Sequence[SampleRow], biased: Sequence[int]) -> None:
    cells = [(i, token, bias) for i in biased for token, bias in rows[i].params.logit_bias]
    where, tokens, biases = zip(*cells, strict=True)
    index = (torch.tensor(where, device=scores_NV.device), torch.tensor(tokens, device=scores_NV.device))
    added = torch.tensor(biases, dtype=scores_NV.dtype, device=scores_NV.device)
    scores_NV.index_put_(index, added, accumulate=True)


def _forbid_ends(
    scores_NV: Tensor, rows: Sequence[SampleRow], early: Sequence[int], eos_token_ids: frozenset[int]
) -> None:
    vocab_size = scores_NV.shape[-1]
    _forbid(
        scores_NV,
        [(i, token) for i in early for token in end_tokens(rows[i], eos_token_ids) if 0 <= token < vocab_size],
    )


def _forbid_words(scores_NV: Tensor, rows: Sequence[SampleRow], worded: Sequence[int]) -> None:
    watches = [(i, row.history.words) for i, row in ((i, rows[i]) for i in worded) if row.history and row.history.words]
    _forbid(scores_NV, [(i, token) for i, watch in watches for token in watch.forbidden])


def _forbid(scores_NV: Tensor, cells: Sequence[tuple[int, int]]) -> None:
    """`cells`: (row, token) pairs."""
    if cells:
        where, tokens = torch.tensor(cells, device=scores_NV.device).unbind(-1)
        scores_NV[where, tokens] = -torch.inf


def eos_token_ids_of(model: PreTrainedModel) -> frozenset[int]:
    """What transformers' generate stops at: the generation config, else the config."""
    for config in (getattr(model, "generation_config", None), model.config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()


def end_tokens(row: SampleRow, eos_token_ids: frozenset[int]) -> frozenset[int]:
    """Tokens that end the answer of a row."""
    return row.params.stop_token_ids | (frozenset() if row.params.ignore_eos else eos_token_ids)


def _keep_to_grammar(scores_NV: Tensor, rows: Sequence[SampleRow], guided: Sequence[int]) -> None:
    matchers = [row.history.matcher for row in (rows[i] for i in guided) if row.history and row.history.matcher]
    _keep_to(scores_NV, guided, allowed_tokens(matchers, scores_NV.shape[-1]).to(scores_NV.device))


def _keep_to_allowed(scores_NV: Tensor, rows: Sequence[SampleRow], bound: Sequence[int]) -> None:
    masks = [row.history.allowed.mask_V for row in (rows[i] for i in bound) if row.history and row.history.allowed]
    _keep_to(scores_NV, bound, torch.stack(masks))


def _keep_to(scores_NV: Tensor, places: Sequence[int], allowed_SV: Tensor) -> None:
    index = torch.tensor(places, device=scores_NV.device)
    scores_NV[index] = scores_NV[index].masked_fill(~allowed_SV, -torch.inf)
