"""Attention of one chunk over the arena and itself, as one differentiable operation per layer.

Shapes: R ranks that share keys (1: none do), c tokens of a chunk on this rank, s of another chunk, H query heads,
G key/value heads, D head dim of q and k, C of v.
Backward adds the gradients of earlier keys to the arena, where those chunks find them when their turn comes, and adds
what later chunks left there to the gradients of its own keys: nothing is concatenated, kept twice or hooked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.chunked.arena import KvArena
from farspan.chunked.layout import ChunkedLayout
from farspan.models.attention import PackedAttention
from farspan.parallel.blockwise import BlockwiseAttention, Gradients, Partial, Rule, add_gradients, zeros_wide
from farspan.parallel.exchange import Exchange
from farspan.parallel.pairs import Pair, PairTable
from farspan.parallel.ulysses import UlyssesAttention


@dataclass(frozen=True)
class ChunkedAttention:
    """The attention of every chunk of one sequence. `keys`: ranks to gather keys from; `heads`: to exchange them with.

    `table` has one entry per chunk and rank of `keys` (or group that exchanges heads); `rows` say where each chunk
    lies in the arena.
    """

    arena: KvArena
    table: PairTable
    rows: tuple[slice, ...]
    keys: Exchange | None = None
    heads: Exchange | None = None

    @classmethod
    def of(
        cls,
        arena: KvArena,
        layout: ChunkedLayout,
        bounds: Sequence[int],
        keys: Exchange | None = None,
        heads: Exchange | None = None,
    ) -> ChunkedAttention:
        """Attention over documents at `bounds`; with both exchanges neighbours in rank order exchange heads."""
        inner = 1 if heads is None else heads.num_ranks
        groups = range(0, layout.num_ranks, inner)
        # After the exchange by heads a rank holds the tokens of its neighbours too: one range of the chunk.
        parts = tuple(
            ((layout.part_of(chunk, first)[0], layout.part_of(chunk, first + inner - 1)[1]),)
            for chunk in layout.chunks
            for first in groups
        )
        rows = tuple(slice(start // len(groups), stop // len(groups)) for start, stop in layout.chunks)
        return cls(arena, PairTable(parts, tuple(bounds)), rows, keys, heads)

    def chunk(self, number: int, *, store: bool = False, weight: float = 1.0) -> ChunkAttention:
        """Attention of chunk `number`, for the model's forward."""
        return ChunkAttention(self, number, store, weight)


@dataclass(frozen=True)
class ChunkAttention:
    """One forward of one chunk. `store`: its keys are kept for later chunks; `weight` of the gradients those left."""

    all: ChunkedAttention
    number: int
    store: bool
    weight: float

    def of_layer(self, layer: int) -> PackedAttention:
        """The attention of one layer."""
        inside = ArenaAttention(self, layer)
        return inside if self.all.heads is None else UlyssesAttention(self.all.heads, inside, max_stages=1)


@dataclass(frozen=True)
class ArenaAttention(BlockwiseAttention):
    """Attention of one chunk in one layer."""

    chunk: ChunkAttention
    layer: int

    def forward(self, q_cHD: Tensor, k_cGD: Tensor, v_cGC: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        if self.chunk.store:
            self._arena.store(self.layer, self._rows[self.chunk.number], k_cGD, v_cGC)
        partial = Partial(q_cHD, v_cGC.shape[2])
        for other in self._seen(rule):
            for rank, block in enumerate(self._blocks(other, k_cGD, v_cGC)):
                partial.add(q_cHD, *block, self._pairs(other, rank, rule), rule)
        return partial.out_tHC.to(q_cHD.dtype), partial.lse_tH

    def backward(
        self, dout_cHC: Tensor, q_cHD: Tensor, k_cGD: Tensor, v_cGC: Tensor, out_cHC: Tensor, lse_cH: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        number, dq_cHD = self.chunk.number, zeros_wide(q_cHD)
        dk_cGD, dv_cGC = zeros_wide(k_cGD), zeros_wide(v_cGC)
        for other in self._seen(rule):
            sums = []
            for rank, (k_sGD, v_sGC) in enumerate(self._blocks(other, k_cGD, v_cGC)):
                into = Gradients(dq_cHD, zeros_wide(k_sGD), zeros_wide(v_sGC))
                met = self._pairs(other, rank, rule)
                add_gradients(into, dout_cHC, q_cHD, k_sGD, v_sGC, out_cHC, lse_cH, met, rule)
                sums.append(into)
            dk_sGD, dv_sGC = self._home(sums)
            if other == number:
                dk_cGD, dv_cGC = dk_sGD, dv_sGC
            else:
                self._arena.add_gradients(self.layer, self._rows[other], dk_sGD, dv_sGC)
        left = self._arena.gradients(self.layer, self._rows[number], k_cGD.device)
        if left is not None:
            dk_cGD.add_(left[0], alpha=self.chunk.weight)
            dv_cGC.add_(left[1], alpha=self.chunk.weight)
        return dq_cHD, dk_cGD, dv_cGC

    @property
    def _arena(self) -> KvArena:
        return self.chunk.all.arena

    @property
    def _rows(self) -> tuple[slice, ...]:
        return self.chunk.all.rows

    @property
    def _ranks(self) -> tuple[int, int]:
        """(this rank, ranks that share keys)."""
        keys = self.chunk.all.keys
        return (0, 1) if keys is None else (keys.rank, keys.num_ranks)

    def _seen(self, rule: Rule) -> list[int]:
        """The chunks, up to this one, of which any rank's queries see a key: all ranks gather the same ones."""
        number, table, (_, num_ranks) = self.chunk.number, self.chunk.all.table, self._ranks

        def seen(other: int) -> bool:
            return any(
                table.between(number * num_ranks + a, other * num_ranks + b, rule.window, rule.chunk)
                for a in range(num_ranks)
                for b in range(num_ranks)
            )

        return [other for other in range(number + 1) if seen(other)]

    def _pairs(self, other: int, rank: int, rule: Rule) -> list[Pair]:
        """Pairs of this rank's queries with the keys of chunk `other` that `rank` holds."""
        own, num_ranks = self._ranks
        first, second = self.chunk.number * num_ranks + own, other * num_ranks + rank
        return self.chunk.all.table.between(first, second, rule.window, rule.chunk)

    def _blocks(self, other: int, k_cGD: Tensor, v_cGC: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of chunk `other`, one block per rank that shares keys."""
        if other == self.chunk.number:
            block = (k_cGD, v_cGC)
        else:
            block = self._arena.load(self.layer, self._rows[other], k_cGD.device)
        keys = self.chunk.all.keys
        if keys is None:
            return [block]
        k_RsGD, v_RsGC = keys.gather(block).wait()
        return list(zip(k_RsGD, v_RsGC, strict=True))

    def _home(self, sums: Sequence[Gradients]) -> tuple[Tensor, Tensor]:
        """(dk_sGD, dv_sGC) of this rank's own keys of a chunk, summed over every rank's queries."""
        keys = self.chunk.all.keys
        if keys is None:
            return sums[0].dk_sGD, sums[0].dv_sGC
        by_rank = [list(part) for part in zip(*((s.dk_sGD, s.dv_sGC) for s in sums), strict=True)]
        dk_sGD, dv_sGC = keys.sum_rows([torch.stack(part) for part in by_rank]).wait()
        return dk_sGD, dv_sGC
