"""The loss by tiles of tokens: logits of one tile exist at a time, and backward computes them again, but for the last.

Backward goes from the last tile to the first: what forward has just computed is there for it, and costs no memory that
backward would not need anyway.

Shapes and contract: contract.py; t tokens of a tile.
Computing gradients already in forward would save one multiplication by the head, but then the gradient of the loss is
not known yet: it can be multiplied in later only if it is one number for all tokens, the head's whole gradient has to
be kept until then, and an evaluation pays for gradients nobody wants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from farspan.kernels.linear_cross_entropy.contract import HeadRule, check_tensors, wide_dtype

# Rows of the head whose gradient is added at a time on a GPU: bounds the memory of the product before it is added.
_VOCAB_ROWS = 16384


@dataclass(frozen=True, slots=True)
class LastTile:
    """What forward computed last, for a backward that may write over it."""

    start: int
    x_tV: Tensor
    """Logits as the softmax sees them."""
    slope_tV: Tensor | None
    """Derivative of the soft cap at each."""


def tiled_forward(
    hidden_TE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, labels_T: Tensor, rule: HeadRule, tile_tokens: int
) -> tuple[Tensor, Tensor, LastTile | None]:
    """(loss_T, lse_T, what backward may begin with; None when no token counts)."""
    check_tensors(hidden_TE, weight_VE, bias_V, labels_T)
    wide = wide_dtype(hidden_TE.dtype)
    loss_T, lse_T = (hidden_TE.new_zeros(hidden_TE.shape[0], dtype=wide) for _ in range(2))
    last = None
    for rows in labelled_tiles(labels_T, rule.ignored, tile_tokens):
        # Freed first: two tiles never exist at once.
        last = None
        x_tV, slope_tV = _logits(hidden_TE[rows], weight_VE, bias_V, rule)
        counted_t = labels_T[rows] != rule.ignored
        lse_t = x_tV.logsumexp(-1)
        label_t1 = labels_T[rows].masked_fill(~counted_t, 0).unsqueeze(-1)
        loss_t = lse_t - (1 - rule.label_smoothing) * x_tV.gather(1, label_t1).squeeze(-1)
        if rule.label_smoothing:
            loss_t -= rule.label_smoothing * x_tV.mean(-1)
        if rule.z_loss:
            loss_t += rule.z_loss * lse_t.square()
        # Not multiplied by 0: a token that does not count may have logits that are not finite.
        loss_T[rows], lse_T[rows] = (torch.where(counted_t, x_t, 0.0) for x_t in (loss_t, lse_t))
        last = LastTile(rows.start, x_tV, slope_tV)
        del x_tV, slope_tV
    return loss_T, lse_T, last


def tiled_backward(
    dloss_T: Tensor,
    hidden_TE: Tensor,
    weight_VE: Tensor,
    bias_V: Tensor | None,
    labels_T: Tensor,
    lse_T: Tensor,
    rule: HeadRule,
    tile_tokens: int,
    wanted: tuple[bool, bool, bool] = (True, True, True),
    last: list[LastTile] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dhidden_TE, dweight_VE, dbias_V). A gradient that is wanted is never None, even where no token counts.

    `last`: what forward kept, taken out of the list and written over; anything that is not there is computed again.
    """
    check_tensors(hidden_TE, weight_VE, bias_V, labels_T)
    wide = wide_dtype(hidden_TE.dtype)
    dhidden_TE = torch.zeros_like(hidden_TE) if wanted[0] else None
    dweight_VE = torch.zeros_like(weight_VE, dtype=wide) if wanted[1] else None
    dbias_V = torch.zeros_like(bias_V, dtype=wide) if wanted[2] and bias_V is not None else None
    for rows in reversed(labelled_tiles(labels_T, rule.ignored, tile_tokens)):
        logits = _take(last, rows) or _logits(hidden_TE[rows], weight_VE, bias_V, rule)
        dy_tV = _dlogits(dloss_T[rows], labels_T[rows], lse_T[rows], *logits, rule)
        del logits
        if dhidden_TE is not None:
            torch.mm(dy_tV.to(weight_VE.dtype), weight_VE, out=dhidden_TE[rows])
        if dweight_VE is not None:
            _add_product(dweight_VE, dy_tV, hidden_TE[rows])
        if dbias_V is not None:
            dbias_V += dy_tV.sum(0)
        del dy_tV
    return dhidden_TE, dweight_VE, dbias_V


def _take(last: list[LastTile] | None, rows: slice) -> tuple[Tensor, Tensor | None] | None:
    if not last or last[0].start != rows.start:
        return None
    kept = last.pop()
    return kept.x_tV, kept.slope_tV


def labelled_tiles(labels_T: Tensor, ignored: int, tile_tokens: int) -> list[slice]:
    """The tiles in which a token counts: prompts, padding and documents without labels cost nothing.

    One look at the labels for all tiles, because each look waits for the device.
    """
    num_tiles = -(-labels_T.shape[0] // tile_tokens)
    counted_T = pad(labels_T != ignored, (0, num_tiles * tile_tokens - labels_T.shape[0]))
    return [
        slice(number * tile_tokens, min((number + 1) * tile_tokens, labels_T.shape[0]))
        for number, has_labels in enumerate(counted_T.view(num_tiles, tile_tokens).any(1).tolist())
        if has_labels
    ]


def _logits(
    hidden_tE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, rule: HeadRule
) -> tuple[Tensor, Tensor | None]:
    """(x_tV as the softmax sees them, derivative of the soft cap at each or None), both wide and fresh."""
    x_tV = linear(hidden_tE, weight_VE, bias_V).to(wide_dtype(hidden_tE.dtype))
    if rule.factor != 1.0:
        x_tV.mul_(rule.factor)
    if rule.softcap is None:
        return x_tV, None
    bent_tV = x_tV.div_(rule.softcap).tanh_()
    slope_tV = 1 - bent_tV * bent_tV
    return bent_tV.mul_(rule.softcap), slope_tV


def _dlogits(
    dloss_t: Tensor, labels_t: Tensor, lse_t: Tensor, x_tV: Tensor, slope_tV: Tensor | None, rule: HeadRule
) -> Tensor:
    """dy_tV: gradient of what the head gave, before factor and soft cap; wide. Written over `x_tV`."""
    counted_t = labels_t != rule.ignored
    dloss_t = torch.where(counted_t, dloss_t.to(x_tV.dtype), 0.0)
    dx_tV = x_tV.sub_(lse_t.unsqueeze(-1)).exp_()
    dx_tV.mul_((dloss_t * (1 + 2 * rule.z_loss * lse_t)).unsqueeze(-1))
    if rule.label_smoothing:
        dx_tV.sub_((dloss_t * (rule.label_smoothing / dx_tV.shape[1])).unsqueeze(-1))
    label_t1 = labels_t.masked_fill(~counted_t, 0).unsqueeze(-1)
    dx_tV.scatter_add_(1, label_t1, ((rule.label_smoothing - 1) * dloss_t).unsqueeze(-1))
    if slope_tV is not None:
        dx_tV.mul_(slope_tV)
    if rule.factor != 1.0:
        dx_tV.mul_(rule.factor)
    # exp of the logits of a token that does not count may be infinite, and infinity times its zero is not zero.
    return dx_tV.masked_fill_(~counted_t.unsqueeze(-1), 0.0)


def _add_product(into_VE: Tensor, dy_tV: Tensor, hidden_tE: Tensor) -> None:
    """into_VE += dy_tV^T hidden_tE, summed in the type of `into_VE`."""
    if hidden_tE.dtype == into_VE.dtype or into_VE.device.type != "cuda":
        into_VE.addmm_(dy_tV.t(), hidden_tE.to(into_VE.dtype))
        return
    # On a GPU half-precision operands with sums in fp32: multiplying in fp32 would be many times slower.
    narrow_tV = dy_tV.to(hidden_tE.dtype)
    for rows_rE, dy_tr in zip(into_VE.split(_VOCAB_ROWS), narrow_tV.split(_VOCAB_ROWS, dim=1), strict=True):
        rows_rE += torch.mm(dy_tr.t(), hidden_tE, out_dtype=into_VE.dtype)
