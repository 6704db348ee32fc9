"""Static NTK-aware scaling of rotary positions: a context grows by `factor` through a larger rope_theta.

transformers knows no such rope_type (its `dynamic` looks at the longest position of a batch) and needs none: the config
that comes out says rope_type default and the larger theta, so that transformers alone computes the same.
Source: bloc97 2023, written out in section 3.1 of YaRN (https://arxiv.org/abs/2309.00071).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from farspan.errors import ConfigError, ModelError

_NTK = "ntk"
_FIELDS = ("rope_type", "factor", "rope_theta", "partial_rotary_factor")


def take_ntk(fields: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, float]]:
    """(`fields` of a config with rope_type default in the place of ntk, the factor of each rope that was ntk).

    A factor's key is the kind of layer that `rope_parameters` names, or "" where a model has one rope. `where` is how
    errors name the place of the fields.

    Raises:
        ConfigError: a factor that stretches nothing, a field that ntk does not have, ntk where it would not be read,
            or beside a `rope_scaling`.
    """
    home = "rope_parameters"
    if isinstance(fields.get("text_config"), Mapping):
        text, factors = take_ntk(fields["text_config"], f"{where}text_config.")
        taken, home = {**fields, "text_config": text}, "text_config.rope_parameters"
    else:
        taken, factors = _taken_ropes(fields, where)
    # transformers would only warn of an ntk that is left, or ignore it.
    left = [said for name in ("rope_parameters", "rope_scaling") for said in _says_ntk(taken.get(name), where + name)]
    if left:
        way_out = f"write rope_type: ntk in {home}, for the whole model or inside the kinds of layers that it is for"
        raise ConfigError(left[0], "is not where ntk is read", _NTK, way_out)
    if factors and taken.get("rope_scaling"):
        # Its scaling would win over rope_parameters, and the larger theta would come on top.
        rule = f"cannot stand beside rope_type ntk in {home}"
        raise ConfigError(f"{where}rope_scaling", rule, taken["rope_scaling"], "leave one of the two out")
    return taken, factors


def stretch_ntk(config: PretrainedConfig, factors: Mapping[str, float]) -> None:
    """Write the theta of `factors` (take_ntk) into `config`.

    Raises:
        ModelError: the model has no such rope, one of a single frequency, or one that transformers scales otherwise.
    """
    if not factors:
        return
    text = config.get_text_config(decoder=True)
    for kind, factor in factors.items():
        ropes = getattr(text, "rope_parameters", None) or {}
        rope = (ropes.get(kind) or {}) if kind else ropes
        if rope.get("rope_type") != "default" or "rope_theta" not in rope:
            place = f"rope_parameters.{kind}" if kind else "rope_parameters"
            raise ModelError(
                f"{config.model_type}: rope_type ntk needs a rope of the model with rope_type default and a theta, "
                f"got {place} {rope}; name the kinds of layers as the model's config does, and leave out every other "
                "scaling of positions"
            )
        rope["rope_theta"] = ntk_theta(rope["rope_theta"], factor, _rotary_dim(config, kind))


def ntk_theta(theta: float, factor: float, rotary_dim: int) -> float:
    """The theta whose slowest of `rotary_dim / 2` frequencies is `factor` times slower, and its fastest the same."""
    return float(theta * factor ** (rotary_dim / (rotary_dim - 2)))


def _taken_ropes(fields: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, float]]:
    ropes = fields.get("rope_parameters")
    if not isinstance(ropes, Mapping):
        return dict(fields), {}
    if not any(isinstance(rope, Mapping) for rope in ropes.values()):
        rope, factor = _taken(ropes, f"{where}rope_parameters")
        return {**fields, "rope_parameters": rope}, {} if factor is None else {"": factor}
    plain: dict[str, Any] = dict(ropes)
    factors = {}
    for kind, inner in ropes.items():
        if isinstance(inner, Mapping):
            plain[kind], factor = _taken(inner, f"{where}rope_parameters.{kind}")
            if factor is not None:
                factors[kind] = factor
    return {**fields, "rope_parameters": plain}, factors


def _says_ntk(rope: object, where: str) -> list[str]:
    """The fields of `rope`, at any depth, that say ntk; `type` is the older name of rope_type."""
    if not isinstance(rope, Mapping):
        return []
    here = [f"{where}.{name}" for name in ("rope_type", "type") if rope.get(name) == _NTK]
    return here + [said for kind, inner in rope.items() for said in _says_ntk(inner, f"{where}.{kind}")]


def _taken(rope: Mapping[str, Any], where: str) -> tuple[dict[str, Any], float | None]:
    if rope.get("rope_type") != _NTK:
        return dict(rope), None
    unknown = sorted(set(rope) - set(_FIELDS))
    if unknown:
        raise ConfigError(f"{where}.{unknown[0]}", "is not a field of rope_type ntk", rope[unknown[0]], "leave it out")
    factor = rope.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 <= factor < math.inf:
        raise ConfigError(
            f"{where}.factor",
            "must be how many times longer the context becomes, 1 or more",
            factor,
            "write factor: 4.0 for four times",
        )
    kept = {name: value for name, value in rope.items() if name != "factor"}
    return {**kept, "rope_type": "default"}, float(factor)


def _rotary_dim(config: PretrainedConfig, kind: str) -> int:
    """How many dims of a head turn: as the model itself makes them, twice its frequencies."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    name = f"{kind}_inv_freq" if kind else "inv_freq"
    found = {2 * len(x) for full, x in model.named_buffers() if full.rpartition(".")[2] == name}
    if len(found) != 1 or min(found) <= 2:
        one = f"of {kind} layers" if kind else "for all layers"
        raise ModelError(
            f"{config.model_type}: rope_type ntk needs one rope {one} with more than one frequency, got rotary dims "
            f"{sorted(found)}; name the kinds of layers in rope_parameters as the model's config does, or use linear"
        )
    return found.pop()
