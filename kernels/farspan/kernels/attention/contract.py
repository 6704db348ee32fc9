"""Partial attention of one (query block, key block) pair: the contract every backend keeps.

Shapes: T query tokens, S key tokens, H query heads, G key/value heads (H a multiple of G), D head dim of q and k,
C head dim of v. Query head h reads key/value head h // (H / G).

forward:  out_THC = softmax(scale * q k^T) v over the keys this pair sees,
          lse_TH  = log-sum-exp of the scaled scores, natural log, fp32 (fp64 for fp64 inputs).
backward: takes the FINAL out and lse, merged over every pair a query took part in, so the pair's own softmax never
          has to be known again; returns (dq, dk, dv) of this pair, to be summed over pairs.

Which keys query t of the pair sees:
    offset=None             every key;
    offset=n                keys s <= t + n: n is (position of the first query) - (position of the first key), so the
                            diagonal pair has offset 0 and a later query block a positive one;
    window=w (with offset)  of those, only s > t + n - w: w keys at most, the query's own position included.
A query that sees no key has out 0 and lse -inf. A pair that sees nothing at all is not computed: the caller skips it.

softcap=c replaces the scaled scores x by c * tanh(x / c) before the softmax (Gemma 2).

Source: online softmax (Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867) and the block-wise backward of
FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Forward(Protocol):
    def __call__(
        self,
        q_THD: Tensor,
        k_SGD: Tensor,
        v_SGC: Tensor,
        *,
        scale: float,
        offset: int | None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]: ...


class Backward(Protocol):
    def __call__(
        self,
        dout_THC: Tensor,
        q_THD: Tensor,
        k_SGD: Tensor,
        v_SGC: Tensor,
        out_THC: Tensor,
        lse_TH: Tensor,
        *,
        scale: float,
        offset: int | None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def check_pair(q_THD: Tensor, k_SGD: Tensor, v_SGC: Tensor, offset: int | None, window: int | None) -> None:
    """Assert the shapes of the contract: a wrong one is our bug, not a user's."""
    assert q_THD.ndim == k_SGD.ndim == v_SGC.ndim == 3, "packed tensors: tokens, heads, head dim"
    assert q_THD.shape[1] % k_SGD.shape[1] == 0, "query heads must be a multiple of key/value heads"
    assert k_SGD.shape[:2] == v_SGC.shape[:2], "keys and values disagree"
    assert q_THD.shape[2] == k_SGD.shape[2], "queries and keys disagree on head dim"
    assert window is None or (offset is not None and window > 0), "a window is counted back from the query's position"
