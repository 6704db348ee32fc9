"""Layers that carry a state along a document (linear attention, state spaces), on ranks that share a sequence.

Shapes: T tokens of the sequence, t tokens this rank holds, L tokens of one document, E model width, R ranks; K, U, X, S
and C as in recurrence.py.

A layer whose module is known (gated_delta.py, state_space.py) is switched: projections, gate and norm on the rank's
own tokens, one exchange, then convolution and recurrence over every token of 1 / R of the heads, one exchange back.
Any other layer is gathered: every rank collects the sequence, runs the module on every document, and keeps its own
tokens, at the price of R times the computation. Either way each document starts from an empty state.

It is done by giving the modules of one model a `forward` of their own, which is the class's forward wherever no whole
sequence is passed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from farspan.errors import ModelError
from farspan.models.gated_delta import gated_delta
from farspan.models.parts import decoder_layers
from farspan.models.recurrence import Recurrence, UnitSizes, units_of_rank
from farspan.models.rules import layer_rules
from farspan.models.state_space import state_space

WHOLE_KEYWORD = "farspan_whole"
_MIXERS = ("linear_attn", "mamba", "self_attn")


class Whole(Protocol):
    """The packed sequence of which a rank holds a shard."""

    @property
    def bounds(self) -> Sequence[int]:
        """Where documents begin in the sequence, and its end."""
        ...

    @property
    def rank(self) -> int: ...

    @property
    def num_ranks(self) -> int: ...

    def documents(self, x_tE: Tensor) -> list[Tensor]:
        """Every document [L, E] of the sequence, in order, from the shards of all ranks."""
        ...

    def held(self, x_TE: Tensor) -> Tensor:
        """[t, E]: this rank's tokens of the whole sequence."""
        ...

    def to_channels(self, x_tRX: Tensor) -> Tensor:
        """[t, R, X], row r for rank r -> [T, 1, X]: what every rank had for this one, in the order of the sequence."""
        ...

    def to_tokens(self, x_T1X: Tensor) -> Tensor:
        """[T, 1, X] -> [t, R, X]: back to this rank's tokens."""
        ...


@dataclass(frozen=True, slots=True)
class MixerFacts:
    """One recurrent layer for a plan. `units` are none where its module is not known and its tokens are gathered."""

    name: str
    width: int
    units: UnitSizes | None

    def bytes_sent(self, shard_tokens: int, itemsize: int, num_ranks: int) -> int:
        """Bytes one rank sends in forward for one sequence; backward sends as many."""
        if self.units is None:
            return shard_tokens * self.width * itemsize * (num_ranks - 1)
        sizes, share = self.units, self.units.units_per_rank(num_ranks)
        there = (share * sizes.in_numbers + sizes.shared_numbers) * itemsize
        back = share * sizes.out_numbers * (max(4, itemsize) if sizes.wide_out else itemsize)
        return shard_tokens * (there + back) * (num_ranks - 1)


def hook_mixers(model: PreTrainedModel) -> None:
    """Make the recurrent layers of `model`, and only of it, run over the whole sequence when one is passed in.

    Raises:
        ModelError: a recurrent layer whose module is not found.
    """
    for mixer in recurrent_mixers(model):
        mixer.forward = MethodType(_forward, mixer)


def recurrent_mixers(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that carry a state, in layer order."""
    mixers = []
    for number, rule in enumerate(layer_rules(model.config)):
        if not rule.recurrent:
            continue
        layer = decoder_layers(model)[number]
        found = [getattr(layer, name) for name in _MIXERS if isinstance(getattr(layer, name, None), nn.Module)]
        if len(found) != 1:
            raise ModelError(
                f"{type(model).__name__}: layer {number} is recurrent but has no module {' or '.join(_MIXERS)} to run "
                "by document"
            )
        mixers.append(found[0])
    return mixers


def mixer_facts(model: PreTrainedModel) -> tuple[MixerFacts, ...]:
    """Every recurrent layer in numbers; the model may be on the meta device."""
    width = model.config.get_text_config(decoder=True).hidden_size
    facts = []
    for mixer in recurrent_mixers(model):
        recurrence = recurrence_of(mixer)
        facts.append(MixerFacts(type(mixer).__name__, width, None if recurrence is None else recurrence.sizes))
    return tuple(facts)


def recurrence_of(mixer: nn.Module) -> Recurrence | None:
    """`mixer` in units; none: its inside is not known."""
    return gated_delta(mixer) or state_space(mixer)


def _forward(mixer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """In the place of a mixer's forward."""
    whole: Whole | None = kwargs.pop(WHOLE_KEYWORD, None)
    if whole is None:
        # Another use of this model (the model's own forward): the module stays what it is.
        return type(mixer).forward(mixer, *args, **kwargs)
    if kwargs.get("attention_mask") is not None or kwargs.get("cache_params") is not None:
        raise ModelError(f"{type(mixer).__name__} was given a mask or a cache, which a packed batch does not have")
    hidden_1tE = kwargs["hidden_states"] if not args else args[0]
    assert hidden_1tE.shape[0] == 1, "a packed batch is one row"
    recurrence = recurrence_of(mixer)
    if recurrence is None:
        return _gathered(mixer, hidden_1tE[0], whole)
    return _switched(recurrence, hidden_1tE[0], whole).unsqueeze(0)


def _switched(recurrence: Recurrence, hidden_tE: Tensor, whole: Whole) -> Tensor:
    """[t, E]: the recurrence over all tokens of this rank's units."""
    sizes, num_ranks = recurrence.sizes, whole.num_ranks
    share = sizes.units_per_rank(num_ranks)
    units_tKX, shared_tS, gate = recurrence.project(hidden_tE)
    missing = share * num_ranks - sizes.num_units
    rows_tRX = nn.functional.pad(units_tKX, (0, 0, 0, missing)).flatten(1).unflatten(1, (num_ranks, -1))
    rows_tRX = torch.cat([rows_tRX, shared_tS.unsqueeze(1).expand(-1, num_ranks, -1)], dim=2)
    rows_TX = whole.to_channels(rows_tRX).squeeze(1)
    assert whole.bounds[-1] == rows_TX.shape[0], "documents cover the sequence"
    units_TX, shared_TS = rows_TX.split([share * sizes.in_numbers, sizes.shared_numbers], dim=1)
    units_TUX = units_TX.unflatten(1, (share, -1))
    part = recurrence.part(units_of_rank(sizes, whole.rank, num_ranks, hidden_tE.device))
    documents = [part(units_TUX[a:b], shared_TS[a:b]) for a, b in pairwise(whole.bounds) if b > a]
    out_tRX = whole.to_tokens(torch.cat(documents).flatten(1).unsqueeze(1))
    out_tKC = out_tRX.flatten(1).unflatten(1, (share * num_ranks, -1))[:, : sizes.num_units]
    return recurrence.finish(out_tKC, gate)


def _gathered(mixer: nn.Module, hidden_tE: Tensor, whole: Whole) -> Any:
    """[1, t, E], alone or with what the module gives beside it: the module itself on every document, on every rank."""
    own, beside, outputs = type(mixer).forward, None, []
    for document_LE in whole.documents(hidden_tE):
        output = own(mixer, hidden_states=document_LE.unsqueeze(0))
        if isinstance(output, tuple):
            output, *beside = output
        outputs.append(output[0])
    joined = whole.held(torch.cat(outputs)).unsqueeze(0)
    return joined if beside is None else (joined, *(None for _ in beside))
