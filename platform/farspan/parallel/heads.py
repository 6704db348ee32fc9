"""How any number of heads is spread over any number of ranks. Pure.

Letters: H query heads, G key/value heads, N = H / G query heads that read one key head, R ranks.
A key head is copied, its group of queries cut into as many parts, and what is missing to an even spread is padded
with zeros: padded queries find something nobody reads, and their gradients are exactly zero.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """`copies` of each of the G key heads, padded to `kv_heads`; each is read by `group` query heads (some padded)."""

    num_q_heads: int
    num_kv_heads: int
    copies: int
    group: int
    kv_heads: int

    @property
    def q_heads(self) -> int:
        """Query heads after padding."""
        return self.kv_heads * self.group

    def spread_queries(self, q_tHD: Tensor) -> Tensor:
        """[t, H, D] -> [t, q_heads, D]: H/R neighbours read the key heads that lie beside them."""
        if self.q_heads == self.num_q_heads:
            return q_tHD
        parts = pad(q_tHD.unflatten(1, (self.num_kv_heads, -1)), (0, 0, 0, self._missing))
        by_copy = parts.flatten(1, 2).unflatten(1, (self.num_kv_heads * self.copies, self.group))
        return pad(by_copy, (0, 0, 0, 0, 0, self._padded_copies)).flatten(1, 2)

    def spread_keys(self, x_tGD: Tensor) -> Tensor:
        """[t, G, D] -> [t, kv_heads, D]."""
        if self.copies > 1:
            x_tGD = x_tGD.repeat_interleave(self.copies, dim=1)
        return pad(x_tGD, (0, 0, 0, self._padded_copies)) if self._padded_copies else x_tGD

    def collect(self, out_tHC: Tensor) -> Tensor:
        """[t, q_heads, C] -> [t, H, C]: padded heads are dropped."""
        if self.q_heads == self.num_q_heads:
            return out_tHC
        by_copy = out_tHC.unflatten(1, (self.kv_heads, self.group))[:, : self.num_kv_heads * self.copies]
        groups = by_copy.flatten(1, 2).unflatten(1, (self.num_kv_heads, self.copies * self.group))
        return groups[:, :, : self.num_q_heads // self.num_kv_heads].flatten(1, 2)

    @property
    def _missing(self) -> int:
        return self.copies * self.group - self.num_q_heads // self.num_kv_heads

    @property
    def _padded_copies(self) -> int:
        return self.kv_heads - self.num_kv_heads * self.copies


def plan_heads(num_q_heads: int, num_kv_heads: int, num_ranks: int) -> HeadPlan:
    """The spread with the least computation per rank, and of those the one that sends the fewest key heads."""
    assert num_q_heads % num_kv_heads == 0, "query heads must be a multiple of key/value heads"
    group = num_q_heads // num_kv_heads
    plans = [
        HeadPlan(
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            copies=copies,
            group=-(-group // copies),
            kv_heads=-(-num_kv_heads * copies // num_ranks) * num_ranks,
        )
        for copies in range(1, group + 1)
    ]
    return min(plans, key=lambda plan: (plan.q_heads, plan.kv_heads))
