"""MEMO executed: of a recomputed layer's matrix products, the first alpha of the tokens are swapped, the rest computed
again.

Letters: T tokens (rows of a product), H swapped rows (the head), E inputs, N outputs.

A row of a matrix product depends on no other row, so products are cut by rows. Both parts are computed apart in
forward already: then recomputation multiplies the same shapes, and its bits are the same on every machine. Attention is
swapped whole, never computed again. Everything else (norms, rotations, activations, sums) is pointwise and cheap, and
is computed again for all tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farspan.activations.offload import ActivationOffload
from farspan.activations.offload_replay import ContextFn, Give, Op, Recorder, contexts_of, give_saved
from farspan.errors import ConfigError

_aten = torch.ops.aten
# Matrix products, and which argument holds the rows.
PRODUCTS = {_aten.mm.default: 0, _aten.addmm.default: 1}
ATTENTION = tuple(
    getattr(_aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
)


class TokenRecorder(Recorder):
    """Products by rows, attention whole, the rest again."""

    def __init__(self, offload: ActivationOffload, alpha: float, attention: tuple[Op, ...]) -> None:
        super().__init__(offload)
        self._alpha, self._attention = alpha, attention

    def record(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Give | None]:
        if op in self._attention:
            out = op(*args, **kwargs)
            return out, give_saved(self.offload, out, move=True)
        if op in PRODUCTS and not kwargs:
            return self._product(op, args)
        return op(*args, **kwargs), None

    def _product(self, op: Op, args: tuple[Any, ...]) -> tuple[Any, Give | None]:
        num_rows = args[PRODUCTS[op]].shape[0]
        num_swapped = round(self._alpha * num_rows)
        if num_swapped == 0:
            return op(*args), None
        if num_swapped == num_rows or not _by_rows(op, args):
            out = op(*args)
            return out, give_saved(self.offload, out, move=True)
        head_HN = op(*_rows(op, args, slice(0, num_swapped)))
        tail_N = op(*_rows(op, args, slice(num_swapped, num_rows)))
        saved = give_saved(self.offload, head_HN, move=True)

        def give(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            tail = op(*_rows(op, args, slice(num_swapped, num_rows)))
            return torch.cat([saved(op, args, kwargs), tail])

        return torch.cat([head_HN, tail_N]), give


def memo_contexts(offload: ActivationOffload, alpha: float, attention: tuple[Op, ...] = ATTENTION) -> ContextFn:
    """The `context_fn` of non-reentrant checkpointing that swaps a share `alpha` of the tokens; see memo.choose_alpha.

    `attention`: operators that are swapped whole.

    Raises:
        ConfigError: alpha is no share.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ConfigError("alpha", "must be between 0 and 1", alpha, "take it from choose_alpha")
    return contexts_of(TokenRecorder(offload, alpha, attention))


def _by_rows(op: Op, args: tuple[Any, ...]) -> bool:
    """A bias with rows of its own would have to be cut too."""
    return op is not _aten.addmm.default or args[0].ndim == 1


def _rows(op: Op, args: tuple[Any, ...], rows: slice) -> tuple[Any, ...]:
    place = PRODUCTS[op]
    return (*args[:place], args[place][rows], *args[place + 1 :])
