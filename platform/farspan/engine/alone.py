"""The path for models that cannot be packed: every sequence is computed alone, with a cache of transformers' own.

The cache is whatever the model itself makes. Pages and states hold nothing then: they count what the caches take, so
that the scheduler keeps within the configured memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from farspan.engine.lowrank import LowRank
from farspan.engine.probe import accepts, cache_argument
from farspan.engine.runner import Piece
from farspan.errors import ModelError
from farspan.kv.states import StatePool

_MEASURED_TOKENS = (8, 24)


@dataclass(frozen=True, slots=True)
class Manner:
    """How a model wants to be continued."""

    stepwise: bool = False
    """Its cache is right only when one token is computed at a time."""
    masked: bool = False
    """It wants a mask of ones over all tokens so far, as generate passes it."""

    def __str__(self) -> str:
        more = [word for word, there in (("stepwise", self.stepwise), ("masked", self.masked)) if there]
        return " ".join(("alone", *more))


class AloneRunner:
    """The model, one sequence at a time."""

    def __init__(
        self, model: PreTrainedModel, states: StatePool, manner: Manner, lowrank: LowRank | None = None
    ) -> None:
        self._model, self._states, self._manner = model, states, manner
        self._lowrank = lowrank or LowRank()

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Logits [R, V]: the `num_logits` last tokens of each piece."""
        return torch.cat([self._run(piece) for piece in pieces])

    def _run(self, piece: Piece) -> Tensor:
        assert piece.left_out == 0, "transformers' own cache leaves nothing out"
        assert piece.state is not None, "a sequence that is computed alone keeps its cache in a state slot"
        cache = self._states.kept[piece.state] if piece.past else None
        assert (cache is None) == (piece.past == 0), "the cache of a sequence was lost"
        size = 1 if self._manner.stepwise and piece.past else len(piece.tokens)
        first_wanted = len(piece.tokens) - piece.num_logits
        parts: list[Tensor] = []
        for low in range(0, len(piece.tokens), size):
            tokens = piece.tokens[low : low + size]
            # At least one: a forward gives logits of something.
            wanted = max(0, low + len(tokens) - max(low, first_wanted))
            with self._lowrank.over([(piece.adapter, len(tokens))]):
                logits_RV, cache = call_alone(
                    self._model, tokens, piece.past + low, cache, self._manner, num_logits=max(1, wanted)
                )
            parts += [logits_RV] if wanted else []
        self._states.kept[piece.state] = cache
        return torch.cat(parts)


def call_alone(
    model: PreTrainedModel, tokens: Sequence[int], past: int, cache: Any, manner: Manner, *, num_logits: int = 1
) -> tuple[Tensor, Any]:
    """(logits [num_logits, V] of the last tokens, the cache after them)."""
    device, name = model.device, cache_argument(model)
    given: dict[str, Any] = {"use_cache": True}
    if cache is not None:
        given[name] = cache
    if accepts(model, "position_ids"):
        given["position_ids"] = torch.arange(past, past + len(tokens), device=device).unsqueeze(0)
    if accepts(model, "logits_to_keep"):
        given["logits_to_keep"] = num_logits
    if manner.masked:
        given["attention_mask"] = torch.ones(1, past + len(tokens), dtype=torch.long, device=device)
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([list(tokens)], device=device), **given)
    after = getattr(output, name, None)
    if after is None:
        raise ModelError(f"{model.config.model_type} gives no cache back")
    return output.logits[0, -num_logits:], after


def measure_cache(model: PreTrainedModel) -> tuple[int, int]:
    """(bytes of one more token, bytes of a sequence beside its tokens) of the model's own cache."""
    sizes = []
    for count in _MEASURED_TOKENS:
        _, cache = call_alone(model, [0] * count, 0, None, Manner())
        sizes.append(sum({x.data_ptr(): x.nbytes for x in _tensors(cache)}.values()))
    few, many = _MEASURED_TOKENS
    token_bytes = max(0, -(-(sizes[1] - sizes[0]) // (many - few)))
    return token_bytes, max(0, sizes[0] - few * token_bytes)


def _tensors(x: Any) -> Iterator[Tensor]:
    """Every tensor a cache holds."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict):
        for value in x.values():
            yield from _tensors(value)
    elif isinstance(x, (list, tuple)):
        for value in x:
            yield from _tensors(value)
    elif hasattr(x, "__dict__") and not isinstance(x, (type, torch.nn.Module)) and hasattr(x, "__module__"):
        yield from _tensors(
            {k: v for k, v in vars(x).items() if isinstance(v, (Tensor, dict, list, tuple)) or k == "layers"}
        )
