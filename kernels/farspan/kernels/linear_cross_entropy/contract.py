"""Loss of every token from its last hidden state, through a linear head: the contract every backend keeps.

Shapes: T tokens, E model width, V vocabulary; "wide" is fp32, or fp64 for fp64 inputs.

    x_TV = bend(factor * (hidden_TE weight_VE^T + bias_V)),  bend(y) = softcap * tanh(y / softcap) or y
    lse_T = log-sum-exp of x_TV
    loss_T = (1 - s) * (lse - x[label]) + s * (lse - mean over V of x) + z * lse^2,  s label smoothing, z z-loss

forward:  (loss_T, lse_T), both wide. A token whose label is `ignored` has loss 0 and lse 0, and its logits are not
          computed when its whole tile is ignored.
backward: takes dloss_T, the gradient of each token's own loss, so that a weight per token, a mean over any count and
          any scale of the loss are the caller's arithmetic; returns (dhidden_TE, dweight_VE, dbias_V), each None
          where it is not wanted. dweight_VE and dbias_V are summed over tokens in the wide type.

Sources: label smoothing (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567, in torch's convention, all V classes
sharing s); z-loss (Chowdhery et al. 2022, section 5, https://arxiv.org/abs/2204.02311).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadRule:
    """What is done to logits, and what their loss is."""

    factor: float = 1.0
    """Logits are multiplied by it (Cohere's logit_scale, one over Granite's logits_scaling)."""
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignored: int = -100


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type losses and sums are kept in."""
    return torch.promote_types(dtype, torch.float32)


def check_tensors(hidden_TE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, labels_T: Tensor) -> None:
    """Assert the shapes of the contract: a wrong one is our bug, not a user's."""
    assert hidden_TE.ndim == weight_VE.ndim == 2, "tokens and vocabulary as rows"
    assert hidden_TE.shape[1] == weight_VE.shape[1], "hidden states and head disagree on the width"
    assert labels_T.shape == hidden_TE.shape[:1], "one label per token"
    assert bias_V is None or bias_V.shape == weight_VE.shape[:1], "one bias per vocabulary entry"
    assert hidden_TE.dtype == weight_VE.dtype, "hidden states and head are of one type"
    # A sharded weight would be gathered by every operation of every tile; it is gathered once, outside.
    assert not hasattr(weight_VE, "full_tensor"), "the head's weight must be whole here"
