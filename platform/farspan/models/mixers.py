"""Layers that carry a state along a document (linear attention), when a rank holds only some of its tokens.

Shapes: T tokens of the sequence, t tokens this rank holds, L tokens of one document, E model width.

Every rank collects the whole sequence, runs the layer's own module on each document from an empty state, and keeps
its own tokens. No state crosses a document, and gradients come back through the same exchange. The price is compute:
R ranks each run the layer over all tokens.

It is done with torch's public hooks on the modules of one model: before the module's own forward its input becomes
the first document, after it the other documents follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from farspan.errors import ModelError
from farspan.models.parts import decoder_layers
from farspan.models.rules import layer_rules

WHOLE_KEYWORD = "farspan_whole"
_MIXER = "linear_attn"


class Whole(Protocol):
    """The packed sequence of which a rank holds a shard."""

    def documents(self, x_tE: Tensor) -> list[Tensor]:
        """Every document [L, E] of the sequence, in order, from the shards of all ranks."""
        ...

    def held(self, x_TE: Tensor) -> Tensor:
        """[t, E]: this rank's tokens of the whole sequence."""
        ...


@dataclass(frozen=True)
class _Rest:
    """What is left to do after the module's own call."""

    whole: Whole
    documents: list[Tensor]


def hook_mixers(model: PreTrainedModel) -> None:
    """Make the recurrent layers of `model`, and only of it, run document by document. Once per model.

    Raises:
        ModelError: a recurrent layer whose module is not known.
    """
    for mixer in recurrent_mixers(model):
        if not any(hook is _begin for hook in mixer._forward_pre_hooks.values()):
            mixer.register_forward_pre_hook(_begin, with_kwargs=True)
            mixer.register_forward_hook(_finish, with_kwargs=True)


def recurrent_mixers(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that carry a state, in layer order."""
    mixers = []
    for number, rule in enumerate(layer_rules(model.config)):
        if not rule.recurrent:
            continue
        mixer = getattr(decoder_layers(model)[number], _MIXER, None)
        if not isinstance(mixer, nn.Module):
            raise ModelError(
                f"{type(model).__name__}: layer {number} is recurrent but has no module {_MIXER!r} to run by document"
            )
        mixers.append(mixer)
    return mixers


def _begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    name, whole = type(module).__name__, kwargs.get(WHOLE_KEYWORD)
    if whole is None:
        # Another use of this model (the model's own forward): the module stays what it is.
        return args, kwargs
    if kwargs.get("attention_mask") is not None or kwargs.get("cache_params") is not None:
        raise ModelError(f"{name} was given a mask or a cache, which a packed batch does not have")
    hidden_1tE = kwargs["hidden_states"] if not args else args[0]
    assert hidden_1tE.shape[0] == 1, "a packed batch is one row"
    documents = whole.documents(hidden_1tE[0])
    changed = {"hidden_states": documents[0].unsqueeze(0), WHOLE_KEYWORD: _Rest(whole, documents[1:])}
    return (), {**kwargs, **changed}


def _finish(module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    rest = kwargs.get(WHOLE_KEYWORD)
    if not isinstance(rest, _Rest):
        return output
    outputs = [output[0]]
    for document_LE in rest.documents:
        outputs.append(module.forward(**{**kwargs, "hidden_states": document_LE.unsqueeze(0)})[0])
    return rest.whole.held(torch.cat(outputs)).unsqueeze(0)
