"""The models of one endpoint: what their configs must agree on, and what belongs to each. Plain values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from farspan.config.schema import ServeConfig
from farspan.errors import ConfigError
from farspan.serve.naming import ModelNames

# What is the address's, and not a model's.
_SHARED = ("host", "port", "listener", "api_key_file", "max_body_bytes", "body_timeout_s", "request_timeout_s")
_NOT_PLAIN = re.compile("[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Place:
    """One model of an endpoint."""

    name: str
    """What clients call it."""
    label: str
    """What the names of its deployments and of what it measures end in; nothing, where it is the only one."""
    config: ServeConfig
    num_beside: int
    """Ranks of the other models' workers, with which it shares machines."""


def model_name(config: ServeConfig) -> str:
    """What clients call the model."""
    return config.name or config.model.rstrip("/").rpartition("/")[2]


def line_up(configs: Sequence[ServeConfig]) -> tuple[Place, ...]:
    """The place of each config.

    Raises:
        ConfigError: they do not agree on their address, or names would mean two things.
    """
    names = [model_name(config) for config in configs]
    refuse_shared_names([ModelNames(n, config.engine.adapters) for n, config in zip(names, configs, strict=True)])
    for name, config in zip(names[1:], configs[1:], strict=True):
        _refuse_other_address(names[0], configs[0], name, config)
    labels = ["" if len(configs) == 1 else f"-{_NOT_PLAIN.sub('-', name)}" for name in names]
    if len(set(labels)) < len(labels):
        rule = "must differ from another model's in more than the letters that no deployment's name can have"
        raise ConfigError("name", rule, ", ".join(names), "give one of them another name")
    ranks = [_num_ranks(config) for config in configs]
    return tuple(
        Place(name, label, config, sum(ranks) - mine)
        for name, label, config, mine in zip(names, labels, configs, ranks, strict=True)
    )


def refuse_shared_names(models: Sequence[ModelNames]) -> None:
    """Raises ConfigError when clients would mean two models by one name."""
    owner: dict[str, str] = {}
    for names in models:
        for name in names.all:
            if name in owner:
                rule = f"must not be a name that clients also use for model {owner[name]!r} or its adapters"
                raise ConfigError("name", rule, name, "set `name` in one of the configs, or rename the adapter")
            owner[name] = names.model


def objectives_of(places: Sequence[Place]) -> Mapping[str, tuple[float, float]]:
    """(first_token_s, token_s) that each model's clients should see, by its label."""
    return {place.label: (place.config.objectives.first_token_s, place.config.objectives.token_s) for place in places}


def _refuse_other_address(first: str, agreed: ServeConfig, name: str, config: ServeConfig) -> None:
    for field in _SHARED:
        mine, wanted = getattr(config, field), getattr(agreed, field)
        if mine != wanted:
            rule = f"must be what model {first!r} has ({wanted!r}), with which {name!r} shares an address"
            raise ConfigError(field, rule, mine, f"give {field}=VALUE for all")


def _num_ranks(config: ServeConfig) -> int:
    num_workers = sum(role.most for role in (config.prefill, config.decode))
    return num_workers * config.engine.tensor_parallel
