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
        ConfigError: a factor that stretches nothing, or a field that ntk does not have.
    """
    if isinstance(fields.get("text_config"), Mapping):
        text, factors = take_ntk(fields["text_config"], f"{where}text_config.")
        return {**fields, "text_config": text}, factors
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


def stretch_ntk(config: PretrainedConfig, factors: Mapping[str, float]) -> None:
    """Write the theta of `factors` (take_ntk) into `config`.

    Raises:
        ModelError: the model has no such rope, or one of a single frequency.
    """
    if not factors:
        return
    text = config.get_text_config(decoder=True)
    for kind, factor in factors.items():
        rope = text.rope_parameters[kind] if kind else text.rope_parameters
        rope["rope_theta"] = ntk_theta(rope["rope_theta"], factor, _rotary_dim(config, kind))


def ntk_theta(theta: float, factor: float, rotary_dim: int) -> float:
    """The theta whose slowest of `rotary_dim / 2` frequencies is `factor` times slower, and its fastest the same."""
    return float(theta * factor ** (rotary_dim / (rotary_dim - 2)))


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
