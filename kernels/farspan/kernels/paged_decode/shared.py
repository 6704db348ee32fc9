"""Compositions of partial attention and merge: a prefix shared by many rows, and prefill over cached tokens.

Letters: contract.py; T tokens of a prompt's new piece, L tokens of a prefix, N pages of a prefix.
Source: RelayAttention (Zhu et al. 2024, https://arxiv.org/abs/2402.14808).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from farspan.kernels.attention.contract import Forward
from farspan.kernels.merge.reference import merge_partials_reference
from farspan.kernels.paged_decode.contract import AttendPages
from farspan.kernels.team.quiet import on_one_thread


def attend_shared_prefix(
    attend: AttendPages,
    q_BQHD: Tensor,
    keys_PSGD: Tensor,
    values_PSGC: Tensor,
    prefix_N: Tensor,
    prefix_length_1: Tensor,
    tables_BN: Tensor,
    lengths_B: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    log_weights_PSG: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of rows that begin with one common prefix, whose pages are read once and not once per row.

    `tables_BN` and `lengths_B` are each row's own tokens, those after the prefix, its queries' among them. A window
    would begin at another token of the prefix in every row: layers with one attend their rows one by one.
    """
    rule: dict[str, Any] = {"scale": scale, "softcap": softcap, "log_weights_PSG": log_weights_PSG}
    pages = (keys_PSGD, values_PSGC)
    # All queries of all rows are the queries of one row that sees the whole prefix.
    q_1XHD = q_BQHD.flatten(0, 1).unsqueeze(0)
    shared_1XHC, shared_lse_1XH = attend(q_1XHD, *pages, prefix_N.unsqueeze(0), prefix_length_1, causal=False, **rule)
    own_BQHC, own_lse_BQH = attend(q_BQHD, *pages, tables_BN, lengths_B, **rule)
    # Some thousand numbers: threads of torch would cost more than they compute.
    with on_one_thread() if q_BQHD.device.type == "cpu" else nullcontext():
        out_XHC, lse_XH = merge_partials_reference(
            shared_1XHC[0], shared_lse_1XH[0], own_BQHC.flatten(0, 1), own_lse_BQH.flatten(0, 1)
        )
    return out_XHC.view_as(own_BQHC), lse_XH.view_as(own_lse_BQH)


def attend_after_prefix(
    forward: Forward,
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGC: Tensor,
    keys_PSGD: Tensor,
    values_PSGC: Tensor,
    prefix_N: Tensor,
    prefix_tokens: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of T new tokens of a prompt whose first `prefix_tokens` tokens are in pages already.

    Many queries make this bound by arithmetic, not by reading: the prefix is gathered once, for a kernel of long
    ranges, instead of being read through the table by every tile of queries.
    """
    num_slots = keys_PSGD.shape[1]
    first = 0 if window is None else max(0, prefix_tokens - window + 1)
    out_THC, lse_TH = forward(q_THD, k_TGD, v_TGC, scale=scale, offset=0, window=window, softcap=softcap)
    if first >= prefix_tokens:
        return out_THC, lse_TH
    # Only tokens that some query sees: slots before every window may hold anything, even NaN.
    first_page = first // num_slots
    pages_N = prefix_N[first_page : -(-prefix_tokens // num_slots)]
    tokens = slice(first - first_page * num_slots, prefix_tokens - first_page * num_slots)
    k_LGD, v_LGC = (x[pages_N].flatten(0, 1)[tokens] for x in (keys_PSGD, values_PSGC))
    # Without a window every query sees the whole prefix, which is the cheaper question.
    offset = None if window is None else prefix_tokens - first
    past_THC, past_lse_TH = forward(q_THD, k_LGD, v_LGC, scale=scale, offset=offset, window=window, softcap=softcap)
    return merge_partials_reference(past_THC, past_lse_TH, out_THC, lse_TH)


def split_prefix(tables_BN: Tensor, lengths_B: Tensor, num_pages: int, num_slots: int) -> tuple[Tensor, ...]:
    """(prefix_N, prefix_length_1, tables_BN, lengths_B) of rows whose first `num_pages` pages are the same."""
    prefix_length_1 = torch.full((1,), num_pages * num_slots, dtype=lengths_B.dtype, device=lengths_B.device)
    return tables_BN[0, :num_pages], prefix_length_1, tables_BN[:, num_pages:], lengths_B - prefix_length_1
