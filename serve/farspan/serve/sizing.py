"""The size of the application as Ray Serve asks for it: an application-level autoscaling policy.

Ray Serve asks for the replicas of all deployments at once, holds a decision back until it has been the same for a while
(scaling.up_s, down_s, to_zero_s), and starts or drains replicas. It sends this module to its controller by value and
imports the others there: what decides is in autoscale.py.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    """The policy. The deployment `api` tells what it measures."""

    def __init__(self, first_token_s: float, token_s: float) -> None:
        self._objectives = Objectives(first_token_s, token_s)

    def __call__(self, contexts: Mapping[Any, Context]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """(replicas, nothing to remember) of each deployment."""
        named = {context.deployment_name: context for context in contexts.values()}
        wanted = {name: context.target_num_replicas for name, context in named.items()}
        # While Serve starts or deletes an application, not all of it is there.
        if {"api", "prefill", "decode"} <= set(named):
            roles = role(named["prefill"]), role(named["decode"])
            wanted["prefill"], wanted["decode"] = sizes(signals(named["api"]), *roles, self._objectives)
        return {key: wanted[context.deployment_name] for key, context in contexts.items()}, {}


def signals(api: Context) -> Signals:
    """The newest signals; of several ingresses, what each sees is added up, or the worst of it holds."""
    found: dict[str, float] = {}
    for name in (field.name for field in fields(Signals)):
        values = [series[-1].value for series in (api.raw_metrics or {}).get(name, {}).values() if series]
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


def as_metrics(told: Signals) -> dict[str, float]:
    """The signals as Ray Serve takes them from a replica."""
    return {name: float(value) for name, value in asdict(told).items()}
