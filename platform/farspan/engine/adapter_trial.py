"""Whether adapters may stand beside layers of a model: tried out before any request, as the model itself was.

Two prompts with two adapters that could not differ more are computed together, in chunks, and each alone. A layer
that gets its rows in an order of its own, as an expert does, or that is never called, is found out here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from farspan.engine.lowrank import Pair
from farspan.engine.path import Path, tolerance
from farspan.engine.runner import Piece
from farspan.errors import EngineError, ModelError

_PROMPT_TOKENS = (23, 17)
_BOUNDS = (0, 9, 10, 11, 23)
# No name of a user's adapter: it has a space.
_NAMES = ("trial 0", "trial 1")


def try_layers(model: PreTrainedModel, path: Path, layers: Mapping[str, nn.Module]) -> None:
    """Raises ModelError when an adapter beside these layers would not be computed exactly, with the reason.

    Raises EngineError when there are no pages or states for two short sequences now.
    """
    lowrank = path.lowrank
    lowrank.attach(layers)
    lowrank.pairs |= {name: _strong_pairs(layers, seed) for seed, name in enumerate(_NAMES)}
    generator = torch.Generator().manual_seed(0)
    vocab_size = int(model.get_input_embeddings().num_embeddings)
    prompts = [torch.randint(0, vocab_size, (count,), generator=generator).tolist() for count in _PROMPT_TOKENS]
    try:
        with _calls_seen(layers) as called:
            wanted = {**_run(path, prompts, [0]), **_run(path, prompts, [1])}
            got = _run(path, prompts, [0, 1])
    finally:
        lowrank.detach(list(layers))
        for name in _NAMES:
            del lowrank.pairs[name]
    if silent := sorted(layers.keys() - called):
        raise ModelError(f"{silent[0]} is not called for every prompt: an adapter beside it cannot be tried out")
    together, alone = (torch.stack([found[key] for key in sorted(wanted)]).double() for found in (got, wanted))
    error = float((together - alone).norm() / alone.norm().clamp_min(1e-30))
    # Written so that NaN is refused too.
    if not error <= tolerance(model.dtype, path.states is not None):
        raise ModelError(f"with two adapters in one batch logits differ by {error:.2g} of their norm from one by one")


def _strong_pairs(layers: Mapping[str, nn.Module], seed: int) -> dict[str, Pair]:
    """Matrices of rank 1 that add about as much as the layers themselves give."""
    generator = torch.Generator().manual_seed(seed)
    pairs: dict[str, Pair] = {}
    for name, layer in layers.items():
        weight = layer.weight
        assert isinstance(weight, Tensor), "an adapter stands beside a linear layer"
        # Conv1D of transformers keeps its weight the other way round.
        num_out, num_in = weight.shape if isinstance(layer, nn.Linear) else weight.T.shape
        row_norm = float(weight.detach().double().norm()) / num_out**0.5
        down_RI = torch.randn(1, num_in, generator=generator) / num_in**0.5
        up_OR = torch.randn(num_out, 1, generator=generator)
        pairs[name] = Pair(down_RI.to(weight), up_OR.to(weight), row_norm)
    return pairs


def _run(path: Path, prompts: Sequence[list[int]], which: Sequence[int]) -> dict[tuple[int, int], Tensor]:
    """(prompt, end of a chunk) -> logits [V] there, the prompts `which` computed side by side."""
    layout, states = path.pool.layout, path.states
    owners = {i: f"trial {i}" for i in which}
    pages = {i: path.pool.alloc(layout.num_pages(len(prompts[i]))) for i in which}
    found: dict[tuple[int, int], Tensor] = {}
    try:
        if None in pages.values() or (states is not None and states.num_free < len(which)):
            raise EngineError("too few pages are free to try an adapter out; add it when fewer requests run")
        for low, high in pairwise(_BOUNDS):
            todo = [i for i in which if low < len(prompts[i])]
            pieces = [_piece(path, prompts[i][low:high], low, pages[i] or [], i, owners[i]) for i in todo]
            for i, logits_V in zip(todo, path.runner.run(pieces), strict=True):
                found[i, min(high, len(prompts[i]))] = logits_V
    finally:
        for i in which:
            path.pool.free(pages[i] or [])
            if states is not None:
                states.release(owners[i])
    return found


def _piece(path: Path, tokens: list[int], past: int, pages: list[int], number: int, owner: str) -> Piece:
    state = None if path.states is None else path.states.hold(owner)
    return Piece(tokens, past, pages, state, adapter=_NAMES[number])


@contextmanager
def _calls_seen(layers: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """The names of those that were called."""
    called: set[str] = set()

    def note(name: str) -> Any:
        return lambda *_: called.add(name)

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()
