"""Attention of prompts over pages in plain torch, segment after segment: what the kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from farspan.kernels.attention.reference import attend_reference
from farspan.kernels.paged_prefill.contract import Prompts, check_prompts


def attend_prompts_reference(
    q_THD: Tensor,
    keys_PSGD: Tensor,
    values_PSGC: Tensor,
    prompts: Prompts,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    check_prompts(q_THD, keys_PSGD, values_PSGC, prompts, causal, window)
    slots, (num_tokens, num_heads, _) = keys_PSGD.shape[1], q_THD.shape
    wide = torch.promote_types(q_THD.dtype, torch.float32)
    out_THC = torch.zeros(num_tokens, num_heads, values_PSGC.shape[3], dtype=q_THD.dtype)
    lse_TH = torch.full((num_tokens, num_heads), float("-inf"), dtype=wide)
    numbers = torch.stack([prompts.starts_B, prompts.lengths_B, prompts.pasts_B, prompts.lows_B], 1).tolist()
    for (start, length, past, low), table_N in zip(numbers, prompts.tables_BN, strict=True):
        # Slots before every window may hold NaN, and are on no page.
        first = low if window is None else max(low, past + 1 - window)
        seen = torch.arange(first, max(first, past + length if causal else past))
        if not len(seen):
            continue
        page, slot = table_N[seen // slots].long(), seen % slots
        here = slice(start, start + length)
        out_THC[here], lse_TH[here] = attend_reference(
            q_THD[here],
            keys_PSGD[page, slot],
            values_PSGC[page, slot],
            scale=scale,
            offset=past - first if causal else None,
            window=window,
            softcap=softcap,
        )
    return out_THC, lse_TH
