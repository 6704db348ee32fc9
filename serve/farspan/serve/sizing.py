"""The size of the application as Ray Serve asks for it: an application-level autoscaling policy.

Ray Serve asks for the replicas of all deployments at once, holds a decision back until it has been the same for a while
(scaling.up_s, down_s, to_zero_s), and starts or drains replicas. It sends this module to its controller by value and
imports the others there: what decides is in autoscale.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, Protocol

from farspan.serve.autoscale import Objectives, Role, Signals, sizes


class Context(Protocol):
    """What is read of Ray Serve's AutoscalingContext."""

    deployment_name: str
    current_num_replicas: int
    target_num_replicas: int
    capacity_adjusted_min_replicas: int
    capacity_adjusted_max_replicas: int
    raw_metrics: Mapping[str, Mapping[Any, Any]] | None


class Sizing:
    """The policy, for each model by itself. The deployment `api` tells what it measures."""

    def __init__(self, objectives: Mapping[str, Sequence[float]]) -> None:
        """(first_token_s, token_s) of each model, by what the names of its deployments end in."""
        self._objectives = {label: Objectives(*seconds) for label, seconds in objectives.items()}

    def __call__(self, contexts: Mapping[Any, Context]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """(replicas, nothing to remember) of each deployment."""
        named = {context.deployment_name: context for context in contexts.values()}
        wanted = {name: context.target_num_replicas for name, context in named.items()}
        for label, objectives in self._objectives.items():
            prefill, decode = f"prefill{label}", f"decode{label}"
            # While Serve starts or deletes an application, not all of it is there.
            if {"api", prefill, decode} <= set(named):
                roles = role(named[prefill]), role(named[decode])
                wanted[prefill], wanted[decode] = sizes(signals(named["api"], label), *roles, objectives)
        return {key: wanted[context.deployment_name] for key, context in contexts.items()}, {}


def signals(api: Context, label: str = "") -> Signals:
    """The newest signals of a model; of several ingresses, what each sees is added up, or the worst of it holds."""
    found: dict[str, float] = {}
    for name in (field.name for field in fields(Signals)):
        values = [series[-1].value for series in (api.raw_metrics or {}).get(f"{name}{label}", {}).values() if series]
        if values:
            added = name in ("prompt_tokens_s", "answer_tokens_s", "num_open")
            found[name] = sum(values) if added else max(values)
    return Signals(**found)


def role(context: Context) -> Role:
    return Role(
        context.target_num_replicas,
        context.current_num_replicas,
        context.capacity_adjusted_min_replicas,
        context.capacity_adjusted_max_replicas,
    )


def as_metrics(told: Signals, label: str = "") -> dict[str, float]:
    """The signals of a model as Ray Serve takes them from a replica."""
    return {f"{name}{label}": float(value) for name, value in asdict(told).items()}
