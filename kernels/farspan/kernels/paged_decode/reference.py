"""Attention over pages in plain torch: the ground truth. Contract and letters: contract.py.

Materialises the gathered keys and the scores; T = N * S tokens of the longest table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farspan.kernels.paged_decode.contract import check_pages


def attend_pages_reference(
    q_BQHD: Tensor,
    keys_PSGD: Tensor,
    values_PSGC: Tensor,
    tables_BN: Tensor,
    lengths_B: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    log_weights_PSG: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_pages(q_BQHD, keys_PSGD, values_PSGC, tables_BN, lengths_B, causal, window, log_weights_PSG)
    num_queries, num_heads, group = q_BQHD.shape[1], q_BQHD.shape[2], q_BQHD.shape[2] // keys_PSGD.shape[2]
    wide = torch.promote_types(q_BQHD.dtype, torch.float32)
    used_BN = used_pages(tables_BN, lengths_B, keys_PSGD.shape[1])
    seen_BQT = seen(lengths_B, num_queries, used_BN.shape[1] * keys_PSGD.shape[1], causal, window)
    # Zeros for what no query sees: it may be NaN, and 0 * NaN is NaN.
    anyone_BT11 = seen_BQT.any(1)[:, :, None, None]
    k_BTHD, v_BTHC = (
        pages[used_BN].flatten(1, 2).masked_fill(~anyone_BT11, 0.0).to(wide).repeat_interleave(group, 2)
        for pages in (keys_PSGD, values_PSGC)
    )
    scores_BHQT = torch.einsum("bqhd,bthd->bhqt", q_BQHD.to(wide), k_BTHD) * scale
    if softcap is not None:
        scores_BHQT = softcap * (scores_BHQT / softcap).tanh()
    if log_weights_PSG is not None:
        weights_BTH = log_weights_PSG[used_BN].flatten(1, 2).repeat_interleave(num_heads // keys_PSGD.shape[2], 2)
        scores_BHQT = scores_BHQT + weights_BTH.to(wide).transpose(1, 2).unsqueeze(2)
    scores_BHQT = scores_BHQT.masked_fill(~seen_BQT.unsqueeze(1), float("-inf"))
    lse_BHQ = scores_BHQT.logsumexp(-1)
    # A query that sees nothing has lse -inf: its probabilities are zero, not NaN.
    pivot_BHQ = lse_BHQ.masked_fill(lse_BHQ.isneginf(), 0.0)
    out_BQHC = torch.einsum("bhqt,bthc->bqhc", (scores_BHQT - pivot_BHQ.unsqueeze(-1)).exp(), v_BTHC)
    return out_BQHC.to(q_BQHD.dtype), lse_BHQ.transpose(1, 2).contiguous()


def used_pages(tables_BN: Tensor, lengths_B: Tensor, num_slots: int) -> Tensor:
    """The tables with page 0 where a row has no page: an entry past the end may be any number."""
    first_N = torch.arange(tables_BN.shape[1], device=tables_BN.device) * num_slots
    return tables_BN.masked_fill(first_N[None, :] >= lengths_B[:, None], 0)


def seen(lengths_B: Tensor, num_queries: int, num_tokens: int, causal: bool, window: int | None) -> Tensor:
    """seen_BQT: which tokens of its row each query sees, written out."""
    token_T = torch.arange(num_tokens, device=lengths_B.device)
    if not causal:
        return (token_T < lengths_B[:, None])[:, None, :].expand(-1, num_queries, -1)
    position_BQ = lengths_B[:, None] - num_queries + torch.arange(num_queries, device=lengths_B.device)
    behind_BQT = position_BQ.unsqueeze(-1) - token_T
    return (behind_BQT >= 0) if window is None else (behind_BQT >= 0) & (behind_BQT < window)
