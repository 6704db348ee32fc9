"""Attention of the tokens of many prompts over keys and values that lie in pages: the contract every kernel keeps.

Shapes: T packed query tokens, H query heads, G key/value heads (H a multiple of G), D head dim of q and k, C head dim
of v; P pages of the pool, S slots of a page, B segments, N pages of a table. Query head h reads key/value head
h // (H / G).

Segment b is tokens starts_B[b] .. + lengths_B[b] of the packed batch; every packed token is in one segment. Token j of
its sequence is in slot j % S of page tables_BN[b, j // S], those of the segment among them, already written. Query i of
the segment is token pasts_B[b] + i of the sequence and sees
    causal=True             tokens lows_B[b] <= j <= pasts_B[b] + i;
    causal=False            tokens lows_B[b] <= j < pasts_B[b], whichever it is itself (a prefix that queries share);
    window=w (with causal)  of those, only the last w, the query's own among them.
A query that sees nothing has out 0 and lse -inf. softcap=c replaces a scaled score x by c * tanh(x / c). Sinks are
merged by the caller, into (out, lse).

Returns out_THC in the type of q and lse_TH, the log-sum-exp of the scores, natural log, fp32 (fp64 for fp64 inputs).

What no query of a segment sees is never computed with: such slots may hold anything, even NaN, and entries of a table
for pages without any other slots any number. A token's result has the same bits however its prompt was cut into
segments, and beside whatever other segments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """The segments of a batch; for all layers of a group of pages with one rule."""

    starts_B: Tensor
    lengths_B: Tensor
    pasts_B: Tensor
    lows_B: Tensor
    tables_BN: Tensor
    """int32 all."""
    plans: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What a kernel has worked out once for all these layers."""


class AttendPrompts(Protocol):
    def __call__(
        self,
        q_THD: Tensor,
        keys_PSGD: Tensor,
        values_PSGC: Tensor,
        prompts: Prompts,
        *,
        scale: float,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]: ...


def check_prompts(
    q_THD: Tensor, keys_PSGD: Tensor, values_PSGC: Tensor, prompts: Prompts, causal: bool, window: int | None
) -> None:
    """Assert the shapes of the contract: a wrong one is our bug, not a user's."""
    assert q_THD.ndim == 3, "queries of packed tokens"
    assert keys_PSGD.ndim == values_PSGC.ndim == 4, "pages of keys and values"
    assert q_THD.shape[1] % keys_PSGD.shape[2] == 0, "query heads must be a multiple of key/value heads"
    assert keys_PSGD.shape[:3] == values_PSGC.shape[:3], "keys and values disagree"
    assert q_THD.shape[2] == keys_PSGD.shape[3], "queries and keys disagree on head dim"
    numbers = (prompts.starts_B, prompts.lengths_B, prompts.pasts_B, prompts.lows_B)
    assert len({len(x) for x in (*numbers, prompts.tables_BN)}) == 1, "one table and four numbers for each segment"
    assert {x.dtype for x in (*numbers, prompts.tables_BN)} == {torch.int32}, "tables and numbers are int32"
    assert window is None or (causal and window > 0), "a window is counted back from the query's position"
