"""Which part of each weight every rank of an engine keeps, by the plan that transformers has for the model.

A layer whose outputs are cut gives each rank some heads, or some channels; the layer behind it is cut by its inputs and
gives partial sums, which the ranks add up. Everything else is whole on every rank.
Source: the two kinds of cut in Megatron-LM (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from farspan.errors import ConfigError, ModelError

# What transformers' plans call a layer that stays whole where nothing is trained, or that can.
_WHOLE = frozenset(
    {
        "embedding_colwise",
        "embedding_rowwise",
        "local_params",
        "mla_kv_a_proj",
        "replicate",
        "replicated_with_grad_allreduce",
    }
)
_OUTPUTS = {"colwise": 1, "packed_colwise": 2}
_INPUTS = {"rowwise": 1, "packed_rowwise": 2}
_SUMS = frozenset({"all_reduce", "moe_tp_experts"})
_HEAD = frozenset({"colwise", "colwise_gather_output", "colwise_rep"})
# Layers of attention that hold whole heads, and those whose heads several ranks may hold alike.
_BY_HEADS, _SHARED = ("q_proj", "q_b_proj", "k_proj", "v_proj", "kv_b_proj", "o_proj"), ("k_proj", "v_proj")
_MOST_RANKS = 64


@dataclass(frozen=True, slots=True)
class Cut:
    """How one weight is cut along one of its dims."""

    weight: str
    dim: int
    size: int
    sections: int = 1
    """Matrices side by side in it, each of which is cut."""
    unit: int = 1
    """What stays together, such as the dims of a head."""
    shared: bool = False
    """Several ranks may keep the same unit where there are fewer units than ranks."""

    @property
    def num_units(self) -> int:
        """Units of one section."""
        return self.size // self.sections // self.unit

    def fits(self, num_ranks: int) -> bool:
        """Whether every rank gets as much."""
        units = self.num_units
        if units < 1 or self.size != units * self.unit * self.sections:
            return False
        return units % num_ranks == 0 or (self.shared and num_ranks % units == 0)

    def kept(self, rank: int, num_ranks: int) -> list[range]:
        """The places along the dim that a rank keeps: one range of each section."""
        count = max(1, self.num_units // num_ranks)
        first = rank * self.num_units // num_ranks
        section = self.size // self.sections
        starts = (number * section + first * self.unit for number in range(self.sections))
        return [range(start, start + count * self.unit) for start in starts]


@dataclass(frozen=True, slots=True)
class CutPlan:
    """What the ranks of one engine do with a model."""

    cuts: tuple[Cut, ...]
    once: tuple[str, ...]
    """Weights that the first rank alone adds, because sums follow."""
    summed: tuple[str, ...]
    """Modules whose outputs the ranks add up."""
    gathered: str | None
    """The module whose outputs are columns of the logits; none: every rank computes all of them."""


@dataclass(slots=True)
class _Draft:
    cuts: list[Cut] = field(default_factory=list)
    once: list[str] = field(default_factory=list)
    summed: list[str] = field(default_factory=list)
    gathered: str | None = None


def check_cut(config: PretrainedConfig, num_ranks: int) -> None:
    """Refuse a degree that a model of this config cannot be cut by. Raises what `plan_cuts` raises."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    plan_cuts(model, num_ranks)


def plan_cuts(model: PreTrainedModel, num_ranks: int) -> CutPlan:
    """How a model is cut.

    Raises:
        ModelError: transformers has no plan for it, or one that does not cut heads.
        ConfigError: there are not so many heads or channels, or they do not divide; nearest legal degrees are named.
    """
    name = model.config.get_text_config(decoder=True).model_type
    draft, head = _Draft(), _head_of(model)
    for path, kind in _planned(model, head):
        if not (_place_head(draft, model, path, kind) if path == head else _place(draft, model, path, kind)):
            raise ModelError(
                f"{name}: its plan for several ranks wants {path} {kind}, which is not done here; "
                "use engine.tensor_parallel=1"
            )
    if not any(cut.unit > 1 for cut in draft.cuts):
        raise ModelError(f"{name}: transformers has no plan that cuts its heads; use engine.tensor_parallel=1")
    if draft.gathered is not None and not draft.cuts[-1].fits(num_ranks):
        # A vocabulary may have any size.
        draft.cuts, draft.gathered = [cut for cut in draft.cuts if not _is_of(cut, draft.gathered)], None
    _refuse_uneven(draft.cuts, num_ranks)
    return CutPlan(tuple(draft.cuts), tuple(draft.once), tuple(draft.summed), draft.gathered)


def _planned(model: PreTrainedModel, head: str | None) -> Iterator[tuple[str, str]]:
    """(module or weight, kind) of everything that the plan names, the head last."""
    plan: dict[str, str] = model.tp_plan or {}
    names = [name for name, _ in (*model.named_parameters(), *model.named_modules())]
    found = [(name, kind) for name in names if (kind := plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name)))]
    return iter(sorted(found, key=lambda entry: entry[0] == head))


def _head_of(model: PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)


def _place(draft: _Draft, model: PreTrainedModel, path: str, kind: str) -> bool:
    """Enter what a plan says of one module or weight; whether it can be done."""
    if kind in _WHOLE:
        return True
    if kind in _SUMS:
        draft.summed.append(path)
        return True
    found = _found(model, path)
    if isinstance(found, nn.Linear):
        return _place_linear(draft, path, found, kind, model.get_submodule(path.rpartition(".")[0]))
    if not isinstance(found, nn.Parameter):
        return False
    outputs, last = max(0, found.ndim - 2), found.ndim - 1
    if kind in _OUTPUTS:
        draft.cuts.append(Cut(path, outputs, found.shape[outputs], _OUTPUTS[kind]))
    elif kind in _INPUTS and found.ndim > 1:
        draft.cuts.append(Cut(path, last, found.shape[last], _INPUTS[kind]))
    return kind in _OUTPUTS or (kind in _INPUTS and found.ndim > 1)


def _found(model: PreTrainedModel, path: str) -> object:
    owner, _, last = path.rpartition(".")
    return getattr(model.get_submodule(owner), last)


def _place_head(draft: _Draft, model: PreTrainedModel, path: str, kind: str) -> bool:
    layer = _found(model, path)
    if not isinstance(layer, nn.Linear) or kind not in _HEAD:
        return False
    draft.gathered = path
    draft.cuts += _outputs(path, layer, 1, 1, False)
    return True


def _place_linear(draft: _Draft, path: str, layer: nn.Linear, kind: str, owner: nn.Module) -> bool:
    last = path.rpartition(".")[2]
    size = layer.out_features if kind in _OUTPUTS else layer.in_features
    unit = _head_size(owner, size) if last in _BY_HEADS else 1
    if kind in _OUTPUTS:
        draft.cuts += _outputs(path, layer, _OUTPUTS[kind], unit, unit > 1 and last in _SHARED)
    elif kind in _INPUTS:
        draft.cuts.append(Cut(f"{path}.weight", 1, size, _INPUTS[kind], unit))
        draft.summed.append(path)
        if layer.bias is not None:
            draft.once.append(f"{path}.bias")
    return kind in _OUTPUTS or kind in _INPUTS


def _outputs(path: str, layer: nn.Linear, sections: int, unit: int, shared: bool) -> Iterator[Cut]:
    if layer.bias is not None:
        yield Cut(f"{path}.bias", 0, layer.out_features, sections, unit, shared)
    yield Cut(f"{path}.weight", 0, layer.out_features, sections, unit, shared)


def _head_size(attention: nn.Module, size: int) -> int:
    """Inputs or outputs of one head, as far as the module says it."""
    # Heads of latent attention have several sizes.
    if hasattr(attention, "kv_b_proj"):
        return size // cast(int, attention.num_heads)
    known = getattr(attention, "head_dim", None)
    return known if isinstance(known, int) and size % known == 0 else 1


def _is_of(cut: Cut, module: str) -> bool:
    return cut.weight.rpartition(".")[0] == module


def _refuse_uneven(cuts: list[Cut], num_ranks: int) -> None:
    uneven = next((cut for cut in cuts if not cut.fits(num_ranks)), None)
    if uneven is None:
        return
    legal = [degree for degree in range(1, _MOST_RANKS + 1) if all(cut.fits(degree) for cut in cuts)]
    nearest = [*[d for d in legal if d < num_ranks][-1:], *[d for d in legal if d > num_ranks][:1]]
    what = "heads" if uneven.unit > 1 else "channels"
    layer = re.sub(r"\.\d+\.", ".*.", uneven.weight.rpartition(".")[0])
    raise ConfigError(
        "engine.tensor_parallel",
        f"must divide the {uneven.num_units} {what} of {layer}",
        num_ranks,
        f"use engine.tensor_parallel={' or '.join(map(str, nearest))}",
    )
