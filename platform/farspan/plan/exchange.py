"""What sharing a sequence costs a layer, for every strategy, as plain numbers for the planner.

The bytes that are sent are formulas of the room that sends them (farspan/parallel); the buffers follow its code.
"""

from __future__ import annotations

from collections.abc import Iterable

from farspan.parallel import hybrid, ring, ulysses
from farspan.parallel.heads import plan_heads
from farspan.parallel.strategy import bytes_sent
from farspan.parallel.traffic import Block, Traffic
from farspan.plan.profile import AttentionShape, ModelProfile
from farspan.plan.sharing import NOTHING, Sharing, Ways

_TOKENS = 1 << 16  # bytes of one token are those of many, divided: formulas round down once
_MAX_STAGES = 4


def ways_of(profile: ModelProfile, num_ranks: Iterable[int]) -> Ways:
    """Every strategy for every size of group in `num_ranks`, for every attention of the model."""
    found: dict[tuple[str, int, int], tuple[Sharing, ...]] = {}
    for sp in sorted(set(num_ranks)):
        for strategy, inner in strategies(sp):
            found[strategy, sp, inner] = tuple(
                NOTHING if kind.attention is None or sp == 1 else _sharing(strategy, kind.attention, sp, inner, profile)
                for kind in profile.kinds
            )
    return found


def strategies(sp: int) -> list[tuple[str, int]]:
    """(strategy, ulysses degree) of every way to share a sequence over `sp` ranks."""
    if sp == 1:
        return [("ulysses", 1)]
    inner = [n for n in range(2, sp) if sp % n == 0]
    return [*((name, 1) for name in ("ulysses", "ring", "tokenring", "allgather")), *(("hybrid", n) for n in inner)]


def _sharing(strategy: str, shape: AttentionShape, sp: int, inner: int, profile: ModelProfile) -> Sharing:
    size = profile.itemsize
    block = Block(_TOKENS, shape.num_q_heads, shape.num_kv_heads, shape.head_dim, shape.value_dim, size)
    by_heads = {"ulysses": sp, "hybrid": inner}.get(strategy, 1)
    heads = plan_heads(shape.num_q_heads, shape.num_kv_heads, by_heads)
    nothing = Traffic(0, 0)
    if strategy == "hybrid":
        near, far = ulysses.bytes_sent(block, inner), ring.bytes_sent(ulysses.inner_block(block, inner), sp // inner)
        assert hybrid.bytes_sent(block, inner, sp // inner).forward == near.forward + far.forward
    elif strategy == "ulysses":
        near, far = bytes_sent(strategy, block, sp, sp), nothing
    else:
        near, far = nothing, bytes_sent(strategy, block, sp, 1)
    per_head = kv_heads_per_rank(heads.kv_heads, by_heads)
    return Sharing(
        near_forward=near.forward / _TOKENS,
        near_backward=near.backward / _TOKENS,
        far_forward=far.forward / _TOKENS,
        far_backward=far.backward / _TOKENS,
        num_near=by_heads,
        q_factor=heads.q_heads / shape.num_q_heads,
        kv_factor=heads.kv_heads / shape.num_kv_heads,
        stages=max(n for n in range(1, _MAX_STAGES + 1) if per_head % n == 0),
        buffer_bytes=_buffers(strategy, shape, sp, heads.q_heads, heads.kv_heads, size),
        extra_saved_bytes=_extra_saved(shape, heads.q_heads, heads.kv_heads, size),
    )


def kv_heads_per_rank(kv_heads: int, num_ranks: int) -> int:
    """Key heads of a rank between the two exchanges."""
    return kv_heads // num_ranks


def _buffers(strategy: str, shape: AttentionShape, sp: int, q_heads: int, kv_heads: int, size: int) -> float:
    """Bytes for each token of a rank that exist only during the backward of one layer's attention."""
    q, out = q_heads * shape.head_dim, q_heads * shape.value_dim
    kv = kv_heads * (shape.head_dim + shape.value_dim)
    lse = q_heads
    wide = max(4, size)
    if strategy == "ulysses":
        # Gradients and what arrives of them, side by side with the stacked copy that is sent.
        return 2.0 * (q + kv + out) * size
    travelling = 2 * kv * size + 3 * kv * wide + q * wide
    if strategy == "ring":
        return float(travelling)
    if strategy == "hybrid":
        return 2.0 * (q + kv + out) * size + travelling
    if strategy == "tokenring":
        return 2.0 * ((q + 2 * out) * size + (q + lse) * wide) + (q + kv) * wide
    return float(sp * kv * (size + 2 * wide) + q * wide)


def _extra_saved(shape: AttentionShape, q_heads: int, kv_heads: int, size: int) -> float:
    """Bytes a token keeps beyond one rank's attention, because heads are padded or copied."""
    more_q, more_kv = q_heads - shape.num_q_heads, kv_heads - shape.num_kv_heads
    q = more_q * ((shape.head_dim + shape.value_dim) * size + max(4, size))
    return float(q + more_kv * (shape.head_dim + shape.value_dim) * size)
