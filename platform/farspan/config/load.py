"""YAML file + dotlist overrides -> one checked dataclass.

Every refusal is one `ConfigError`: field, rule, value, way out.
"""

from __future__ import annotations

import difflib
import types
import typing
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from farspan.errors import ConfigError, NotFoundError

Schema = TypeVar("Schema")


def load_config(schema: type[Schema], path: str | None, overrides: list[str]) -> Schema:
    """The config a user asked for: defaults of `schema`, then the YAML file, then `a.b=c` overrides.

    Raises:
        NotFoundError: the file does not exist.
        ConfigError: an unknown key, a wrong type, a missing value, broken YAML.
    """
    return config_of(schema, _read_yaml(path), _read_overrides(overrides))


def config_of(schema: type[Schema], *layers: dict[str, Any]) -> Schema:
    """Defaults of `schema`, then each layer; raises ConfigError as `load_config` does."""
    merged = _defaults(typing.cast(Any, schema))
    for layer in filter(None, layers):
        _refuse_unknown_keys(layer, schema, prefix="")
        merged = _merge(merged, layer)
    _refuse_missing(merged, prefix="")
    try:
        return typing.cast(Schema, OmegaConf.to_object(merged))
    except (InterpolationKeyError, MissingMandatoryValue) as problem:
        raise ConfigError(problem.full_key or "config", "must resolve", str(problem), "fix the ${...}") from None


@cache
def _defaults(schema: type) -> DictConfig:
    """Of every key. Made once: it takes as long as all the rest of loading, and merging copies it."""
    return typing.cast(DictConfig, OmegaConf.structured(schema))


def written_keys(path: str | None, overrides: list[str]) -> frozenset[str]:
    """The dotted keys a user set, in the file or by an override."""
    found: set[str] = set()
    for layer in (_read_yaml(path), _read_overrides(overrides)):
        found |= _leaves(layer, "")
    return frozenset(found)


def _leaves(value: Any, prefix: str) -> set[str]:
    if not isinstance(value, dict) or not value:
        return {prefix}
    return {leaf for key, inner in value.items() for leaf in _leaves(inner, f"{prefix}.{key}" if prefix else str(key))}


def parse_config(schema: type[Schema], text: str) -> Schema:
    """The config that `dump_config` wrote: how a config travels to workers and clusters."""
    merged = OmegaConf.merge(_defaults(typing.cast(Any, schema)), OmegaConf.create(text))
    return typing.cast(Schema, OmegaConf.to_object(merged))


def dump_config(config: object) -> str:
    """The config as YAML, everything resolved: what `--dry-run` prints and what a run keeps."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def nearest(value: str, known: list[str]) -> str:
    """`did you mean X?`, or the whole list when nothing is near."""
    matches = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
    return f"did you mean {matches[0]!r}?" if matches else "known: " + ", ".join(sorted(known))


def _read_yaml(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    file = Path(path)
    if not file.is_file():
        siblings = [str(p) for p in sorted(file.parent.glob("*.yaml"))] if file.parent.is_dir() else []
        hint = f"; {nearest(path, siblings)}" if siblings else ""
        raise NotFoundError(path, f"no such config file{hint}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        reason = " ".join(str(problem).split())
        raise ConfigError(path, "must be YAML", reason, "fix the syntax at that line") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(path, "must hold `key: value` lines", type(content).__name__, "start with a key")
    return content


def _read_overrides(overrides: list[str]) -> dict[str, Any]:
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not equals or not key:
            raise ConfigError(item, "an override is written key=value", item, f"write {key or 'key'}=VALUE")
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist(overrides))
    except (OmegaConfBaseException, yaml.YAMLError) as problem:
        reason = " ".join(str(problem).split())
        raise ConfigError("overrides", "must be key=value with a YAML value", reason, "quote the value") from None
    assert isinstance(parsed, dict)
    return typing.cast(dict[str, Any], parsed)


def _refuse_unknown_keys(layer: dict[str, Any], schema: type, prefix: str) -> None:
    hints = typing.get_type_hints(schema)
    known = [f.name for f in fields(typing.cast(Any, schema))]
    for key, value in layer.items():
        if key not in known:
            full = f"{prefix}{key}"
            raise ConfigError(full, "is not a known key", value, nearest(str(key), known))
        section = _section(hints[key])
        if section is None:
            continue
        if not isinstance(value, dict):
            raise ConfigError(
                f"{prefix}{key}",
                "is a section",
                value,
                f"set one of its keys, for example {prefix}{key}.{fields(section)[0].name}",
            )
        _refuse_unknown_keys(value, section, f"{prefix}{key}.")


def _section(hint: Any) -> Any:
    """The dataclass a field holds, or None when it holds a plain value."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((option for option in options if is_dataclass(option)), None)


def _merge(base: DictConfig, layer: dict[str, Any]) -> DictConfig:
    try:
        return typing.cast(DictConfig, OmegaConf.merge(base, OmegaConf.create(layer)))
    except ValidationError as problem:
        field = problem.full_key or "config"
        wanted = _type_name(problem.ref_type or problem.object_type, base, field)
        raise ConfigError(field, f"must be {wanted}", _value_at(layer, field), f"write {field}=<{wanted}>") from None
    except (ConfigKeyError, OmegaConfBaseException) as problem:
        raise ConfigError(problem.full_key or "config", "must fit the schema", problem.msg, "see the docs") from None


def _type_name(fallback: Any, base: DictConfig, field: str) -> str:
    parent, _, name = field.rpartition(".")
    section = OmegaConf.select(base, parent) if parent else base
    owner = OmegaConf.get_type(section) if section is not None else None
    hint = typing.get_type_hints(owner).get(name) if owner and is_dataclass(owner) else fallback
    if hint is None:
        return "a value of its declared type"
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _value_at(layer: dict[str, Any], field: str) -> Any:
    value: Any = layer
    for part in field.split("."):
        if not isinstance(value, dict) or part not in value:
            return value
        value = value[part]
    return value


def _refuse_missing(config: DictConfig, prefix: str) -> None:
    for key in map(str, config):
        full = f"{prefix}{key}"
        if OmegaConf.is_missing(config, key):
            raise ConfigError(full, "must be given", None, f"add {full}=VALUE or set it in the config file")
        if OmegaConf.is_dict(child := config._get_node(key)):
            _refuse_missing(typing.cast(DictConfig, child), f"{full}.")
