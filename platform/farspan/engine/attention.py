"""How attention of a packed batch reads and writes pages, under any transformers decoder.

One function is registered in transformers' attention registry. It finds what this forward needs to know in a keyword
that was passed to the model's forward: nothing is global, and a model that drops the keyword is refused.

Shapes: T packed tokens, H query heads, G key/value heads, D head dim of q and k, C head dim of v, S keys,
B decode rows, N query heads per key/value head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from farspan.errors import ModelError
from farspan.kernels.attention.contract import Forward
from farspan.kernels.merge.reference import merge_partials_reference
from farspan.kv.pages import PagePool

ATTENTION_NAME = "farspan_paged"
KEYWORD = "farspan_attend"
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")


class Attend(Protocol):
    """What the keyword carries."""

    def __call__(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGC: Tensor, scale: float) -> Tensor:
        """Attention output [T, H, C] of one layer."""
        ...


def register_attention() -> None:
    """Make `farspan_paged` known to transformers; doing it again changes nothing.

    No mask function goes with it: transformers then builds no mask at all.
    """
    AttentionInterface.register(ATTENTION_NAME, paged_attention)


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: q [1, H, T, D], k [1, G, T, D], v [1, G, T, C] -> [1, T, H, C]."""
    attend: Attend | None = kwargs.get(KEYWORD)
    layer = getattr(module, "layer_idx", None)
    if attend is None or layer is None:
        raise ModelError(f"{type(module).__name__} does not pass forward keywords on to its attention")
    if used := [name for name in _UNSUPPORTED if kwargs.get(name) is not None]:
        raise ModelError(f"{type(module).__name__} uses {used[0]}, which paged attention does not compute yet")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out_THC = attend(layer, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), scale)
    return out_THC.unsqueeze(0), None


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens start..start+length of the packed batch continue one sequence that has `past` tokens in `pages`."""

    start: int
    length: int
    past: int
    pages_N: Tensor


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """B packed tokens from `start` on, one per sequence, attended in one call."""

    start: int
    tables_BN: Tensor
    """Pages of each row, short rows filled up with their own first page."""
    visible_BS: Tensor
    """Which gathered slots hold a key of the row (its own new key included)."""


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """One forward's pages: decode rows first, then prompt segments."""

    pool: PagePool
    kernel: Forward
    page_T: Tensor
    slot_T: Tensor
    decode: tuple[DecodeRows, ...]
    segments: tuple[Segment, ...]

    def __call__(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGC: Tensor, scale: float) -> Tensor:
        keys_PSGD, values_PSGC = self.pool.keys_PSGD(layer), self.pool.values_PSGC(layer)
        keys_PSGD[self.page_T, self.slot_T] = k_TGD
        values_PSGC[self.page_T, self.slot_T] = v_TGC
        parts: list[Tensor] = []
        for rows in self.decode:
            here = slice(rows.start, rows.start + len(rows.tables_BN))
            parts.append(_attend_rows(q_THD[here], keys_PSGD, values_PSGC, rows, scale))
        for segment in self.segments:
            parts.append(self._attend_segment(segment, keys_PSGD, values_PSGC, q_THD, k_TGD, v_TGC, scale))
        return torch.cat(parts)

    def _attend_segment(
        self,
        segment: Segment,
        keys_PSGD: Tensor,
        values_PSGC: Tensor,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGC: Tensor,
        scale: float,
    ) -> Tensor:
        here = slice(segment.start, segment.start + segment.length)
        out_THC, lse_TH = self.kernel(q_THD[here], k_TGD[here], v_TGC[here], scale=scale, offset=0)
        if segment.past == 0:
            return out_THC
        past_k_SGD = keys_PSGD[segment.pages_N].flatten(0, 1)[: segment.past]
        past_v_SGC = values_PSGC[segment.pages_N].flatten(0, 1)[: segment.past]
        past_THC, past_lse_TH = self.kernel(q_THD[here], past_k_SGD, past_v_SGC, scale=scale, offset=None)
        return merge_partials_reference(past_THC, past_lse_TH, out_THC, lse_TH)[0]


def _attend_rows(q_BHD: Tensor, keys_PSGD: Tensor, values_PSGC: Tensor, rows: DecodeRows, scale: float) -> Tensor:
    """One query per row against its own pages, the rows of a group in one call."""
    k_BGSD = keys_PSGD[rows.tables_BN].flatten(1, 2).transpose(1, 2)
    v_BGSC = values_PSGC[rows.tables_BN].flatten(1, 2).transpose(1, 2)
    # The N query heads that share a key head are the queries of one attention: keys are not repeated.
    q_BGND = q_BHD.unflatten(1, (k_BGSD.shape[1], -1))
    mask_B11S = rows.visible_BS[:, None, None, :]
    out_BGNC = functional.scaled_dot_product_attention(q_BGND, k_BGSD, v_BGSC, attn_mask=mask_B11S, scale=scale)
    return out_BGNC.flatten(1, 2)
