"""Attention over pages on CPU without a compiler: pages gathered side by side, then torch's fused kernel.

Contract and letters: contract.py; M query heads per key/value head, T = N * S tokens of the longest table. A soft cap,
which the kernel does not have, goes to reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from farspan.kernels.paged_decode.contract import check_pages
from farspan.kernels.paged_decode.reference import attend_pages_reference, seen, used_pages

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend_pages_gathered(
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
    if softcap is not None or q_BQHD.numel() == 0 or tables_BN.shape[1] == 0:
        return attend_pages_reference(
            q_BQHD, keys_PSGD, values_PSGC, tables_BN, lengths_B,
            scale=scale, causal=causal, window=window, softcap=softcap, log_weights_PSG=log_weights_PSG,
        )  # fmt: skip
    check_pages(q_BQHD, keys_PSGD, values_PSGC, tables_BN, lengths_B, causal, window, log_weights_PSG)
    num_queries, num_groups, v_dim = q_BQHD.shape[1], keys_PSGD.shape[2], values_PSGC.shape[3]
    used_BN = used_pages(tables_BN, lengths_B, keys_PSGD.shape[1])
    seen_BQT = seen(lengths_B, num_queries, used_BN.shape[1] * keys_PSGD.shape[1], causal, window)
    hidden_BT11 = ~seen_BQT.any(1)[:, :, None, None]
    dim = max(keys_PSGD.shape[3], v_dim)
    k_BGTD, v_BGTD = (
        _wider(pages[used_BN].flatten(1, 2).masked_fill_(hidden_BT11, 0.0), dim).transpose(1, 2)
        for pages in (keys_PSGD, values_PSGC)
    )
    # The M query heads that share a key head are the queries of one attention: keys are not repeated.
    q_BGXD = _wider(q_BQHD.unflatten(2, (num_groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3), dim)
    mask_BGXT = _mask(seen_BQT, q_BQHD.dtype, q_BGXD.shape[2] // num_queries)
    if log_weights_PSG is not None:
        weights_BTG = log_weights_PSG[used_BN].flatten(1, 2).to(mask_BGXT.dtype)
        mask_BGXT = mask_BGXT + weights_BTG.masked_fill(hidden_BT11[..., 0], 0.0).transpose(1, 2).unsqueeze(2)
    out_BGXC, lse_BGX = _FORWARD(q_BGXD, k_BGTD, v_BGTD, 0.0, False, attn_mask=mask_BGXT, scale=scale)
    blind_BGX = mask_BGXT.isneginf().all(-1).expand(-1, num_groups, -1)
    out_BGXC = out_BGXC[..., :v_dim].masked_fill(blind_BGX.unsqueeze(-1), 0.0)
    lse_BGX = lse_BGX.masked_fill(blind_BGX, float("-inf"))
    return _by_query(out_BGXC, num_queries).contiguous(), _by_query(lse_BGX.unsqueeze(-1), num_queries).squeeze(-1)


def _mask(seen_BQT: Tensor, dtype: torch.dtype, group: int) -> Tensor:
    """What is added to scores, [B, 1, M * Q, T]: fp32 also for half types, where a log weight would lose its digits."""
    wide = torch.promote_types(dtype, torch.float32)
    mask_BQT = torch.zeros(seen_BQT.shape, dtype=wide).masked_fill_(~seen_BQT, float("-inf"))
    return mask_BQT.repeat(1, group, 1).unsqueeze(1)


def _by_query(x_BGXC: Tensor, num_queries: int) -> Tensor:
    """[B, G, M * Q, C] -> [B, Q, G * M, C]."""
    return x_BGXC.unflatten(2, (-1, num_queries)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _wider(x: Tensor, dim: int) -> Tensor:
    """Zeros added where a head dim is short: they change no score, and no output that is kept."""
    return pad(x, (0, dim - x.shape[-1])) if x.shape[-1] < dim else x
