"""The sizes of attention on one rank, from which every strategy's bytes follow.

Letters: t tokens a rank holds, H query heads, G key/value heads, D head dim of q and k, C of v.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple


class Traffic(NamedTuple):
    """Bytes one rank sends for one layer and one sequence."""

    forward: int
    backward: int


@dataclass(frozen=True, slots=True)
class Block:
    """What one rank holds of one layer's attention; `itemsize` is the bytes of one number of q, k and v."""

    num_tokens: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    itemsize: int

    @property
    def wide(self) -> int:
        """Bytes of one number of a sum: fp32, or fp64 for fp64 inputs."""
        return max(4, self.itemsize)

    @property
    def q_numbers(self) -> int:
        return self.num_tokens * self.num_q_heads * self.head_dim

    @property
    def kv_numbers(self) -> int:
        return self.num_tokens * self.num_kv_heads * (self.head_dim + self.value_dim)

    @property
    def out_numbers(self) -> int:
        return self.num_tokens * self.num_q_heads * self.value_dim

    @property
    def lse_bytes(self) -> int:
        return self.num_tokens * self.num_q_heads * self.wide

    def with_heads(self, num_tokens: int, num_q_heads: int, num_kv_heads: int) -> Block:
        """The block after tokens were traded for heads."""
        return replace(self, num_tokens=num_tokens, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads)
