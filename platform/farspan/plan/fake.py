"""A model with nothing in it: the layers of a config, two of each kind, on tensors that only have shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from farspan.models.attention import use_farspan_attention
from farspan.models.parts import decoder_layers, trunk_of
from farspan.models.rules import LayerRule, layer_rules

# The module of a recurrent layer that carries the state.
MIXER = "linear_attn"
_MLPS = ("mlp", "feed_forward")


@dataclass(frozen=True)
class Shell:
    """`model` has the layers `numbers` of the real one; `kinds` are groups of layers that are alike, in order."""

    model: PreTrainedModel
    layers: list[nn.Module]
    kinds: list[Kind]
    num_parameters: int
    root_parameters: int
    lora_width: int


@dataclass(frozen=True)
class Kind:
    """Layers that are alike; `shown` is the one of `Shell.layers` that stands for all."""

    rule: LayerRule
    count: int
    shown: int
    num_parameters: int
    shape: str


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Inside, tensors have shapes and no memory."""
    with FakeTensorMode():
        yield


def make_shell(config: PretrainedConfig, dtype: torch.dtype, attention: str = "farspan") -> Shell:
    """Build the model of `config` on the meta device and keep two layers of each kind, as fake tensors.

    Inside `fake_tensors()`. A kind is what a layer may see and the shapes of its weights.
    """
    config = copy.deepcopy(config)
    with torch.device("meta"), unset_fake_temporarily():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if attention == "farspan":
            use_farspan_attention(model)
        else:
            model.set_attn_implementation(attention)
        if model._can_set_experts_implementation():
            # The loop over experts depends on the data; the grouped product does not.
            model.set_experts_implementation("grouped_mm")
    layers, rules = decoder_layers(model), layer_rules(model.config)
    groups: dict[tuple[LayerRule, str], list[int]] = {}
    for number, layer in enumerate(layers):
        groups.setdefault((rules[number], _shape_of(layer)), []).append(number)
    numbers = sorted(number for group in groups.values() for number in group[:2])
    num_parameters = sum(p.numel() for p in model.parameters())
    in_layers = sum(p.numel() for layer in layers for p in layer.parameters())
    lora_width = sum(m.in_features + m.out_features for x in layers for m in x.modules() if isinstance(m, nn.Linear))
    kinds = [
        Kind(
            rule=rule,
            count=len(group),
            # The second of a kind shares its input with a layer before it, as all but the first do.
            shown=numbers.index(group[:2][-1]),
            num_parameters=sum(p.numel() for p in layers[group[0]].parameters()),
            shape=shape,
        )
        for (rule, shape), group in groups.items()
    ]
    kept = _keep_layers(model, numbers)
    _materialize(model)
    return Shell(model, kept, kinds, num_parameters, num_parameters - in_layers, lora_width)


def mlp_of(layer: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module of a layer's dense MLP; none where experts are chosen by token."""
    for name in _MLPS:
        module = getattr(layer, name, None)
        if isinstance(module, nn.Module) and not any("xpert" in type(m).__name__ for m in module.modules()):
            dense = all(not isinstance(m, nn.ModuleList) for m in module.modules())
            return (name, module) if dense and "Sparse" not in type(module).__name__ else None
    return None


def _shape_of(layer: nn.Module) -> str:
    return ";".join(f"{name}:{tuple(p.shape)}" for name, p in layer.named_parameters())


def _keep_layers(model: PreTrainedModel, numbers: list[int]) -> list[nn.Module]:
    """Cut the model down to `numbers`; kept layers go on reading the config they were built from."""
    layers = decoder_layers(model)
    trunk = trunk_of(model)
    name = next(n for n, m in trunk.named_children() if isinstance(m, nn.ModuleList) and list(m) == layers)
    kept = [layers[number] for number in numbers]
    setattr(trunk, name, nn.ModuleList(kept))
    cut = copy.deepcopy(model.config)
    text = cut.get_text_config(decoder=True)
    # Written past transformers' checks: a list by layer and the number of layers cannot change at the same moment.
    kinds = getattr(text, "layer_types", None)
    if kinds:
        object.__setattr__(text, "layer_types", [kinds[number] for number in numbers])
    names = getattr(text, "attribute_map", {})
    object.__setattr__(text, names.get("num_hidden_layers", "num_hidden_layers"), len(numbers))
    model.config = cut
    trunk.config = text if trunk is not model else cut
    return kept


def _materialize(model: nn.Module) -> None:
    """Give every weight and buffer a fake tensor of its shape on the CPU; tied weights stay one."""
    made: dict[int, Tensor] = {}

    def fake(old: Tensor) -> Tensor:
        if id(old) not in made:
            new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
            made[id(old)] = nn.Parameter(new) if isinstance(old, nn.Parameter) else new
        return made[id(old)]

    for module in model.modules():
        _replace(module._parameters, fake)
        _replace(module._buffers, fake)
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                setattr(module, name, fake(value))


def _replace(tensors: dict[str, Any], fake: Callable[[Tensor], Tensor]) -> None:
    for name, old in tensors.items():
        if old is not None:
            tensors[name] = fake(cast(Tensor, old))
