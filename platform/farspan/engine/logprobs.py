"""Log-probabilities the model itself gives to tokens. N rows, S rows that are asked, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from farspan.engine.request import TokenLogprobs


def token_logprobs(
    logits_NV: Tensor, tokens: Sequence[int], num_top: Sequence[int | None]
) -> list[TokenLogprobs | None]:
    """For each row its token and the `num_top` most likely ones; none where `num_top` is none."""
    asked = [i for i, count in enumerate(num_top) if count is not None]
    found: list[TokenLogprobs | None] = [None] * len(tokens)
    if not asked:
        return found
    part_SV = logits_NV[torch.tensor(asked, device=logits_NV.device)]
    part_SV = part_SV if part_SV.element_size() >= 4 else part_SV.float()
    logprobs_SV = part_SV.log_softmax(-1)
    chosen_S1 = torch.tensor([tokens[i] for i in asked], device=logits_NV.device)[:, None]
    chosen = logprobs_SV.gather(-1, chosen_S1)[:, 0].tolist()
    most = min(max(num_top[i] or 0 for i in asked), logits_NV.shape[-1])
    values_SK, order_SK = logprobs_SV.topk(most)
    for place, value, values, order in zip(asked, chosen, values_SK.tolist(), order_SK.tolist(), strict=True):
        count = num_top[place]
        found[place] = TokenLogprobs(tokens[place], value, tuple(zip(order[:count], values[:count], strict=True)))
    return found
