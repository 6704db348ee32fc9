"""Keys, values and their gradients of one whole sequence, for every layer: what chunks leave each other.

Shapes: S tokens in the arena, c of a chunk, G key/value heads, D head dim of q and k, C of v.
A layer's tensors are [S, G, D] and [S, G, C], so that a range of tokens is one block of memory, as the attention
contract takes it; they are made when the layer is first met, because models differ in heads from layer to layer, and
kept for the sequences that follow. Where they lie is the allocator's business: device, pinned, CXL or any other memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.errors import ModelError

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""(shape, type) -> a tensor whose contents do not matter."""


@dataclass
class _Layer:
    k_SGD: Tensor
    v_SGC: Tensor
    dk_SGD: Tensor | None = None
    dv_SGC: Tensor | None = None
    num_written: int = 0

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in (self.k_SGD, self.v_SGC, self.dk_SGD, self.dv_SGC) if x is not None]


class KvArena:
    """Memory for the keys and values of `num_layers` layers.

    `allocate` none: memory beside the first keys stored; `allocate_sums` none: gradients lie where keys do.
    `gradient_dtype` none: gradients are summed in the type of the keys (8 * G * D bytes per token and layer in bf16);
    fp32 sums round less and take 12 * G * D. `free` hears of each allocated tensor that is not used any more.
    """

    def __init__(
        self,
        allocate: Allocate | None = None,
        gradient_dtype: torch.dtype | None = None,
        free: Callable[[Tensor], None] | None = None,
        allocate_sums: Allocate | None = None,
    ) -> None:
        self._allocate, self._gradient_dtype, self._free = allocate, gradient_dtype, free
        self._allocate_sums = allocate_sums or allocate
        self._layers: dict[int, _Layer] = {}
        self._num_tokens, self._with_gradients = 0, False

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for layer in self._layers.values() for x in layer.tensors)

    def begin(self, num_tokens: int, *, gradients: bool) -> None:
        """Forget the last sequence and make ready for one of `num_tokens`."""
        if (num_tokens, gradients) != (self._num_tokens, self._with_gradients):
            self.release()
        self._num_tokens, self._with_gradients = num_tokens, gradients
        for layer in self._layers.values():
            layer.num_written = 0
            for sums in (layer.dk_SGD, layer.dv_SGC):
                if sums is not None:
                    sums.zero_()

    def release(self) -> None:
        """Give the memory back."""
        while self._layers:
            for tensor in self._layers.popitem()[1].tensors:
                if self._free is not None:
                    self._free(tensor)

    def store(self, number: int, rows: slice, k_cGD: Tensor, v_cGC: Tensor) -> None:
        """Keep the keys and values of a chunk. Chunks come in order.

        Raises:
            ModelError: the layer stored this chunk before.
        """
        layer = self._layers.get(number) or self._make(number, k_cGD, v_cGC)
        if rows.start != layer.num_written:
            raise ModelError(f"layer {number} attends more than once in one forward, which chunks cannot follow")
        layer.k_SGD[rows], layer.v_SGC[rows] = k_cGD, v_cGC
        layer.num_written = rows.stop

    def load(self, number: int, rows: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """(k_cGD, v_cGC) of a stored chunk on `device`; the arena's own memory where it is there already."""
        layer = self._layers[number]
        assert rows.stop <= layer.num_written, "a chunk is stored before it is looked at"
        return layer.k_SGD[rows].to(device), layer.v_SGC[rows].to(device)

    def add_gradients(self, number: int, rows: slice, dk_cGD: Tensor, dv_cGC: Tensor) -> None:
        """Add to the gradients of a stored chunk."""
        dk_SGD, dv_SGC = self._sums(number)
        dk_SGD[rows] += dk_cGD.to(dk_SGD.device)
        dv_SGC[rows] += dv_cGC.to(dv_SGC.device)

    def gradients(self, number: int, rows: slice, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """(dk_cGD, dv_cGC) that later chunks left for a chunk; none for a chunk nothing was stored of."""
        if number not in self._layers or rows.stop > self._layers[number].num_written:
            return None
        dk_SGD, dv_SGC = self._sums(number)
        return dk_SGD[rows].to(device), dv_SGC[rows].to(device)

    def _sums(self, number: int) -> tuple[Tensor, Tensor]:
        layer = self._layers[number]
        assert layer.dk_SGD is not None, "the arena was begun with gradients"
        assert layer.dv_SGC is not None, "the arena was begun with gradients"
        return layer.dk_SGD, layer.dv_SGC

    def _make(self, number: int, k_cGD: Tensor, v_cGC: Tensor) -> _Layer:
        allocate = self._allocate or _beside(k_cGD)
        shapes = [(self._num_tokens, *x.shape[1:]) for x in (k_cGD, v_cGC)]
        k_SGD, v_SGC = (allocate(shape, x.dtype) for shape, x in zip(shapes, (k_cGD, v_cGC), strict=True))
        layer = _Layer(k_SGD, v_SGC)
        if self._with_gradients:
            dtype = self._gradient_dtype or k_cGD.dtype
            allocate = self._allocate_sums or _beside(k_cGD)
            layer.dk_SGD, layer.dv_SGC = (allocate(shape, dtype).zero_() for shape in shapes)
        self._layers[number] = layer
        return layer


def arena_bytes(
    num_tokens: int,
    num_layers: int,
    num_kv_heads: int,
    qk_dim: int,
    v_dim: int,
    itemsize: int,
    gradient_itemsize: int | None = None,
) -> int:
    """Bytes an arena holds for one rank's tokens and heads; `gradient_itemsize` 0: without gradients, none: as keys."""
    sums = itemsize if gradient_itemsize is None else gradient_itemsize
    return num_tokens * num_layers * num_kv_heads * (qk_dim + v_dim) * (itemsize + sums)


def _beside(x: Tensor) -> Allocate:
    return lambda shape, dtype: torch.empty(shape, dtype=dtype, device=x.device)
