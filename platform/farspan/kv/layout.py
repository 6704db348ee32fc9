"""The shape of one KV page, and the fingerprint that decides which workers may exchange pages.

Layers may differ in their numbers of heads and in their head dims. A layer here is one call of attention that keeps
keys: a decoder layer, as a rule.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token."""

    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int

    @property
    def token_elements(self) -> int:
        return self.num_kv_heads * (self.k_head_dim + self.v_head_dim)


@dataclass(frozen=True, slots=True)
class KvLayout:
    """One page holds `page_tokens` tokens of every layer, keys then values per layer, contiguous.

    All layers of a page lie together, so that one page is one descriptor of a transfer: few large reads are several
    times faster than many small ones.
    """

    model: str
    """Fingerprint of the weights and config the pages were computed with."""
    layers: tuple[LayerShape, ...]
    dtype: str
    """Name of a torch type, for example float32."""
    page_tokens: int
    counted_token_bytes: int = 0
    """Bytes of a token that lie elsewhere, in a cache of transformers' own, and are only counted here."""
    state: str = ""
    """Fingerprint of the recurrent state that belongs to a sequence beside its pages; empty: there is none."""
    state_bytes: int = 0

    @classmethod
    def uniform(
        cls,
        *,
        model: str,
        num_layers: int,
        num_kv_heads: int,
        k_head_dim: int,
        v_head_dim: int,
        dtype: str,
        page_tokens: int,
    ) -> KvLayout:
        """Every layer alike."""
        return cls(model, (LayerShape(num_kv_heads, k_head_dim, v_head_dim),) * num_layers, dtype, page_tokens)

    @property
    def torch_dtype(self) -> torch.dtype:
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def token_elements(self) -> int:
        """Elements of one token in all layers."""
        return sum(layer.token_elements for layer in self.layers)

    @property
    def page_elements(self) -> int:
        return self.page_tokens * self.token_elements

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in the pool."""
        return self.page_elements * self.torch_dtype.itemsize

    @property
    def cost_bytes(self) -> int:
        """Bytes of memory that a held page stands for."""
        return self.page_bytes + self.page_tokens * self.counted_token_bytes

    def num_pages(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_tokens)

    @property
    def num_state_pages(self) -> int:
        """Pages that hold the recurrent state of a sequence, on its way to another worker."""
        return -(-self.state_bytes // self.page_bytes) if self.page_bytes else 0

    def num_travelling(self, num_tokens: int) -> int:
        """Pages that another worker needs to go on after `num_tokens` tokens, those of the state last."""
        return self.num_pages(num_tokens) + self.num_state_pages

    def fingerprint(self) -> str:
        """Equal on two workers exactly when a page of one means the same on the other."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
