"""Logits to one token. V vocabulary.

The random number of a token depends on (seed, position) alone, by a counter-based generator: a request may be
resumed in another process and goes on with the same tokens.
Source: Philox (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from farspan.engine.request import SamplingParams


def choose_token(logits_V: Tensor, params: SamplingParams, position: int) -> int:
    """The token at `position` of the sequence. The logits must be finite somewhere and never NaN."""
    if params.temperature == 0:
        return int(logits_V.argmax())
    order_V, probs_V = _sorted_probs(logits_V, params)
    cumulative_V = probs_V.cumsum(0)
    point = uniform(params.seed, position) * float(cumulative_V[-1])
    index = int(torch.searchsorted(cumulative_V, torch.tensor(point, dtype=cumulative_V.dtype), right=True))
    return int(order_V[min(index, len(order_V) - 1)])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    # Typed: a list that holds a number of 2**63 or more goes through float64, where neighbouring seeds are one.
    key, counter = (np.array(words, dtype=np.uint64) for words in ([seed % 2**64, 0], [0, 0, 0, position]))
    generator = np.random.Philox(key=key, counter=counter)
    return float(np.random.Generator(generator).random())


def _sorted_probs(logits_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """(token ids, probabilities) most likely first, cut by top_k and top_p; not renormalised."""
    # fp64 on the CPU: the running sum over a large vocabulary must not lose the tail.
    scaled_V = logits_V.detach().cpu().double()
    scaled_V = (scaled_V - scaled_V.max()) / params.temperature
    probs_V, order_V = scaled_V.softmax(0).sort(descending=True, stable=True)
    keep = len(order_V) if params.top_k == 0 else min(params.top_k, len(order_V))
    # The token that crosses top_p still belongs to the set.
    before_V = probs_V.cumsum(0) - probs_V
    keep = min(keep, max(1, int((before_V < params.top_p).sum())))
    return order_V[:keep], probs_V[:keep]
