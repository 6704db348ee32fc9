"""Attention of a few new tokens per row over keys and values that lie in pages: the contract every backend keeps.

Shapes: B rows (one sequence each), Q query tokens of a row (1 in decode, a few when guesses are verified), H query
heads, G key/value heads (H a multiple of G), D head dim of q and k, C head dim of v; P pages of the pool, S slots of a
page, N pages of a table. Query head h reads key/value head h // (H / G).

Token j of row b is in slot j % S of page tables_BN[b, j // S]; the row's visible tokens are j < lengths_B[b], the keys
of its own Q queries among them, already written. Which of those query i (0 <= i < Q) sees:
    causal=True             tokens j <= lengths_B[b] - Q + i: the last query sees all, the first Q - 1 fewer;
    causal=False            all of them (a prefix that many queries share);
    window=w (with causal)  of those, only the last w, the query's own among them.
log_weights_PSG adds to the score of a slot, after scale and softcap: a slot that stands for n merged tokens has log n,
-inf hides it. softcap=c replaces a scaled score x by c * tanh(x / c). Sinks are merged by the caller, into (out, lse).

Returns out_BQHC in the type of q and lse_BQH, the log-sum-exp of the scores, natural log, fp32 (fp64 for fp64 inputs):
partial attention, to be merged with that over other keys (merge/). A query that sees nothing has out 0 and lse -inf.

What no query sees is never computed with: a slot past the end or before every window may hold anything, even NaN, and
an entry of a table past the end any number. lengths and tables are int32 (or int64) on the device of q and read only
there: nothing waits for the device, so a captured CUDA graph is right for whatever they hold when it is replayed.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class AttendPages(Protocol):
    def __call__(
        self,
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
    ) -> tuple[Tensor, Tensor]: ...


def check_pages(
    q_BQHD: Tensor,
    keys_PSGD: Tensor,
    values_PSGC: Tensor,
    tables_BN: Tensor,
    lengths_B: Tensor,
    causal: bool,
    window: int | None,
    log_weights_PSG: Tensor | None,
) -> None:
    """Assert the shapes of the contract: a wrong one is our bug, not a user's."""
    assert q_BQHD.ndim == keys_PSGD.ndim == values_PSGC.ndim == 4, "rows of queries, pages of keys and values"
    assert q_BQHD.shape[2] % keys_PSGD.shape[2] == 0, "query heads must be a multiple of key/value heads"
    assert keys_PSGD.shape[:3] == values_PSGC.shape[:3], "keys and values disagree"
    assert q_BQHD.shape[3] == keys_PSGD.shape[3], "queries and keys disagree on head dim"
    assert tables_BN.ndim == 2, "a table of pages for each row"
    assert tables_BN.shape[0] == lengths_B.shape[0] == q_BQHD.shape[0], "one table and one length per row"
    assert {tables_BN.dtype, lengths_B.dtype} <= {torch.int32, torch.int64}, "tables and lengths are whole numbers"
    assert window is None or (causal and window > 0), "a window is counted back from the query's position"
    assert log_weights_PSG is None or log_weights_PSG.shape == keys_PSGD.shape[:3], "one log weight per slot and head"
