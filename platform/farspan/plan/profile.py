"""What one traced model costs, as plain numbers: bytes and operations of each kind of layer by sequence length.

Torch-free. Bytes are of the compute type the model was traced in, of one sequence on one rank, weights excluded.
Tokens are those a rank holds, except for recurrent layers, where every rank computes the whole sequence.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Poly:
    """c0 + c1 * tokens + c2 * tokens^2."""

    c0: float = 0.0
    c1: float = 0.0
    c2: float = 0.0

    def __call__(self, tokens: float) -> float:
        return self.c0 + tokens * (self.c1 + tokens * self.c2)

    def __add__(self, other: Poly) -> Poly:
        return Poly(self.c0 + other.c0, self.c1 + other.c1, self.c2 + other.c2)

    def times(self, factor: float) -> Poly:
        return Poly(self.c0 * factor, self.c1 * factor, self.c2 * factor)


@dataclass(frozen=True, slots=True)
class Work:
    """Operations and memory traffic of one pass: `flops` of matrix products, `moved` bytes read and written."""

    flops: Poly = Poly()
    moved: Poly = Poly()

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.moved + other.moved)


@dataclass(frozen=True, slots=True)
class Pass:
    """A layer run one way (whole, or with its MLP in tiles)."""

    saved: Poly
    """Bytes autograd keeps until this layer's backward."""
    forward_peak: Poly
    """Most bytes alive at once during forward, beyond what was alive before it; includes `saved`."""
    backward_peak: Poly
    """The same for backward, its incoming gradient included; what was saved counts as alive before."""
    recompute_peak: Poly
    """The same for a backward that first computes the layer again."""
    forward: Work
    backward: Work


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One layer's attention. H query heads, G key/value heads, D head dim of q and k, C of v."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None
    chunk: int | None = None

    def flops(self, tokens: int) -> float:
        """Forward, causal over one document of `tokens`: a multiplication and an addition count as two."""
        pairs = visible_pairs(tokens, self.window, self.chunk)
        return 2.0 * pairs * self.num_q_heads * (self.head_dim + self.value_dim)

    def arena_bytes(self, itemsize: int) -> int:
        """Keys, values and their gradients of one token: what chunk-wise training keeps of it."""
        return 2 * self.num_kv_heads * (self.head_dim + self.value_dim) * itemsize

    def out_bytes(self, itemsize: int) -> int:
        """What attention gives for one token: outputs, and their log-sum-exp in at least fp32."""
        return self.num_q_heads * (self.value_dim * itemsize + max(4, itemsize))


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Bytes of one token in one layer."""

    saved: float
    """Kept for backward where nothing is computed again."""
    products: float
    attention: float


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Layers that are alike."""

    name: str
    count: int
    width: int
    num_parameters: int
    boundary: Poly
    """Bytes of the layer's input: what is kept of it when the rest is computed again."""
    whole: Pass
    tiled: Pass | None
    """With the MLP computed in tiles and again in backward; none: the layer has no MLP that can be tiled."""
    rest: Pass | None
    """A recurrent layer without its mixer, which sees the whole sequence: what a rank's own tokens cost."""
    mlp_peak: Poly
    """Most bytes alive while one tile of the MLP runs backward, by the tokens of the tile."""
    attention: AttentionShape | None
    """None: a recurrent layer."""
    products: Poly = Poly()
    """Bytes its matrix products give in one forward."""
    attention_out: Poly = Poly()
    """Bytes its attention gives."""


@dataclass(frozen=True, slots=True)
class Outside:
    """Bytes of what is not in a layer."""

    saved: Poly
    """Kept for backward: embedding, positions, final norm."""
    tail_saved: Poly
    """Of it, what is free again when the last layer's backward begins."""
    tail_peak: Poly
    """Most bytes the final norm needs in backward beyond what it kept and the gradient it is given."""


@dataclass(frozen=True, slots=True)
class LossCost:
    """The head and cross entropy over a tile of tokens."""

    saved: Poly
    """Bytes kept for backward when logits are not tiled."""
    peak: Poly
    """Most bytes alive while a tile runs forward and backward."""
    forward: Work
    backward: Work


KEPT, ALIVE, MOVED = "kept until backward", "alive for a moment", "read and written"


@dataclass(frozen=True, slots=True)
class Quadratic:
    """An operation whose result grows with the square of the sequence."""

    where: str
    """Module and operation, for example `self_attn: aten.softmax`."""
    bytes_per_token_pair: float
    how: str
    """What happens to these bytes: `KEPT`, `ALIVE` or `MOVED`."""

    def __str__(self) -> str:
        return f"{self.where}: {self.bytes_per_token_pair:.3g} bytes for each pair of tokens, {self.how}"


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """A decoder in numbers, from which every plan follows."""

    name: str
    kinds: tuple[LayerKind, ...]
    num_parameters: int
    root_parameters: int
    """Parameters outside the layers: embedding, head, final norm."""
    lora_width: int
    """Sum of inputs and outputs of the layers' linear modules: LoRA parameters at rank 1."""
    width: int
    vocab_size: int
    itemsize: int
    """Bytes of one number of the compute type."""
    outside_layers: Outside
    outside_tiled: Outside
    """With the final norm in tiles."""
    outside: Work
    loss: LossCost
    quadratics: tuple[Quadratic, ...] = ()
    max_positions: int | None = None

    @property
    def num_layers(self) -> int:
        return sum(kind.count for kind in self.kinds)

    @property
    def recurrent(self) -> bool:
        return any(kind.attention is None for kind in self.kinds)

    @property
    def checkpoint_bytes(self) -> float:
        """Bytes of one token over all layers when each layer keeps only its input."""
        return sum(kind.count * kind.boundary.c1 for kind in self.kinds)

    @property
    def arena_bytes(self) -> float:
        """Bytes of one token over all layers in chunk-wise training (SeCO)."""
        return sum(kind.count * kind.attention.arena_bytes(self.itemsize) for kind in self.kinds if kind.attention)


def visible_pairs(tokens: int, window: int | None, chunk: int | None) -> float:
    """Pairs (query, key) of a causal document, the query's own token included."""
    if chunk is not None and chunk < tokens:
        return tokens // chunk * _causal(chunk) + _causal(tokens % chunk)
    if window is not None and window < tokens:
        return _causal(window) + (tokens - window) * float(window)
    return _causal(tokens)


def _causal(tokens: int) -> float:
    return tokens * (tokens + 1) / 2
