"""The parts of a causal model: its trunk, its repeated layers, and the way from hidden states to logits.

Shapes: T tokens, E model width, V vocabulary.

transformers does not offer a model's tail by itself, so the three things models do after their linear head are done
here, by the config fields that name them. A model that does more is found by the self-check, not trained.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from transformers import PreTrainedModel

from farspan.errors import ModelError

Head = Callable[[Tensor], Tensor]
# The one family that multiplies where every other one divides.
_MULTIPLIES = ("hyperclovax",)


def trunk_of(model: PreTrainedModel) -> nn.Module:
    """The module that gives the last hidden states.

    Raises:
        ModelError: the model does not keep it apart.
    """
    trunk = model.base_model
    if trunk is model:
        # Text halves of multimodal models name their trunk otherwise than their family does.
        trunk = getattr(model, "model", None)
    if not isinstance(trunk, nn.Module) or trunk is model:
        raise ModelError(f"{type(model).__name__} keeps no trunk apart from its head; it cannot be trained exactly")
    return trunk


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated layers of a decoder.

    Raises:
        ModelError: the trunk has no single list of them.
    """
    wanted = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [m for m in trunk_of(model).children() if isinstance(m, nn.ModuleList) and len(m) == wanted]
    if len(lists) != 1:
        raise ModelError(f"{type(model).__name__} keeps no single list of decoder layers; it cannot be trained exactly")
    return list(lists[0])


def trunk_and_head(model: PreTrainedModel) -> tuple[nn.Module, Head]:
    """(module giving the last hidden states, function from hidden_TE to logits_TV) of a causal model.

    Raises:
        ModelError: the model has no linear head.
    """
    trunk, head = trunk_of(model), model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{type(model).__name__} has no plain linear head")
    text = model.config.get_text_config(decoder=True)
    factor = _factor(text)
    softcap = getattr(text, "final_logit_softcapping", None)

    def logits(hidden_TE: Tensor) -> Tensor:
        logits_TV = head(hidden_TE)
        if factor != 1.0:
            logits_TV = logits_TV * factor
        return logits_TV if softcap is None else (logits_TV / softcap).tanh() * softcap

    return trunk, logits


def _factor(text: object) -> float:
    factor = getattr(text, "logit_scale", None) or 1.0
    scaling = getattr(text, "logits_scaling", None) or 1.0
    multiplies = getattr(text, "model_type", "") in _MULTIPLIES
    return float(factor * scaling if multiplies else factor / scaling)
