"""The shape of one KV page, and the fingerprint that decides which workers may exchange pages."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True, slots=True)
class KvLayout:
    """One page holds `page_tokens` tokens of every layer, keys then values per layer, contiguous.

    All layers of a page lie together, so that one page is one descriptor of a transfer: few large reads are several
    times faster than many small ones.
    """

    model: str
    """Fingerprint of the weights and config the pages were computed with."""
    num_layers: int
    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int
    dtype: str
    """Name of a torch type, for example float32."""
    page_tokens: int

    @property
    def torch_dtype(self) -> torch.dtype:
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def token_elements(self) -> int:
        """Elements of one token in one layer."""
        return self.num_kv_heads * (self.k_head_dim + self.v_head_dim)

    @property
    def page_elements(self) -> int:
        return self.num_layers * self.page_tokens * self.token_elements

    @property
    def page_bytes(self) -> int:
        return self.page_elements * self.torch_dtype.itemsize

    def num_pages(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_tokens)

    def fingerprint(self) -> str:
        """Equal on two workers exactly when a page of one means the same on the other."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
