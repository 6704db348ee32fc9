"""The parts of a causal model: its trunk, its repeated layers, and the way from hidden states to logits.

Shapes: T tokens, E model width, V vocabulary.

transformers does not offer a model's tail by itself, so the three things models do after their linear head are done
here, by the config fields that name them. A model that does more is found by the self-check, not trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature

from torch import Tensor, nn
from transformers import PreTrainedModel

from farspan.errors import ModelError

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


def named_token_norms(model: PreTrainedModel) -> list[tuple[nn.Module, str]]:
    """(owner, name) of each normalization between the parts of a layer, and of the final one, that widens its input.

    They treat every token alone. Those inside attention or a mixer are not among them, nor torch's own LayerNorm, which
    keeps no wide copies.
    """
    owners = [*decoder_layers(model), trunk_of(model)]
    return [(owner, name) for owner in owners for name, part in owner.named_children() if _is_token_norm(part)]


def token_norms(model: PreTrainedModel) -> list[nn.Module]:
    """The modules of `named_token_norms`."""
    return [getattr(owner, name) for owner, name in named_token_norms(model)]


def _is_token_norm(part: nn.Module) -> bool:
    # Itself, and x: one that takes more (a gate, a residual) may look beyond its rows.
    only_x = len(signature(type(part).forward).parameters) == 2
    return (
        type(part).__name__.endswith("Norm") and type(part) is not nn.LayerNorm and only_x and not any(part.children())
    )


@dataclass(frozen=True)
class LinearHead:
    """From hidden states to logits: a linear layer (perhaps with an adapter), a factor, a soft cap."""

    linear: nn.Module
    factor: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden_TE: Tensor) -> Tensor:
        """logits_TV."""
        logits_TV: Tensor = self.linear(hidden_TE)
        if self.factor != 1.0:
            logits_TV = logits_TV * self.factor
        return logits_TV if self.softcap is None else (logits_TV / self.softcap).tanh() * self.softcap

    @property
    def plain(self) -> nn.Linear | None:
        """The layer, if its weight and bias say all it does; none for adapters and quantized weights."""
        linear = self.linear
        return linear if isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward else None


def trunk_and_head(model: PreTrainedModel) -> tuple[nn.Module, LinearHead]:
    """(module giving the last hidden states, head from hidden_TE to logits_TV) of a causal model.

    Raises:
        ModelError: the model has no linear head.
    """
    trunk, linear = trunk_of(model), model.get_output_embeddings()
    # An adapter keeps the layer it adds to under this name.
    if not isinstance(getattr(linear, "base_layer", linear), nn.Linear):
        raise ModelError(f"{type(model).__name__} has no plain linear head")
    text = model.config.get_text_config(decoder=True)
    return trunk, LinearHead(linear, _factor(text), getattr(text, "final_logit_softcapping", None))


def _factor(text: object) -> float:
    factor = getattr(text, "logit_scale", None) or 1.0
    scaling = getattr(text, "logits_scaling", None) or 1.0
    multiplies = getattr(text, "model_type", "") in _MULTIPLIES
    return float(factor * scaling if multiplies else factor / scaling)
