"""What Ray Serve is told of the number of replicas, and the application in the form in which it may change them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ServeApplicationSchema, ServeDeploySchema

from farspan.config.schema import RoleConfig, ServeConfig
from farspan.errors import ClusterError
from farspan.serve.lineup import Place, objectives_of

_BUILDER = "farspan.cli.service:build"
_BUILDER_OF_SEVERAL = "farspan.cli.service:build_several"
_POLICY = "farspan.serve.sizing:Sizing"
_POLL_S = 0.1
# So much of what was measured is kept: the policy reads the newest.
_KEPT = 5


def is_scaled(*configs: ServeConfig) -> bool:
    """Whether the number of workers may change, of any of the models."""
    roles = [role for config in configs for role in (config.prefill, config.decode)]
    return any(role.least != role.most for role in roles)


def replicas_of(role: RoleConfig, config: ServeConfig, *, scaled: bool | None = None) -> dict[str, Any]:
    """The options of a deployment that say how many replicas it has. `scaled`: none where its model is alone."""
    if not (is_scaled(config) if scaled is None else scaled):
        return {"num_replicas": role.replicas}
    scaling = config.scaling
    with warnings.catch_warnings():
        # The environment variable that shall replace it holds for whole processes, not for an application.
        warnings.filterwarnings("ignore", message=".*metrics_interval_s", category=DeprecationWarning)
        autoscaling = AutoscalingConfig(
            min_replicas=role.least,
            initial_replicas=role.replicas,
            max_replicas=role.most,
            metrics_interval_s=scaling.measure_s,
            look_back_period_s=scaling.measure_s * _KEPT,
            upscale_delay_s=scaling.up_s,
            downscale_delay_s=scaling.down_s,
            downscale_to_zero_delay_s=scaling.to_zero_s,
        )
    return {"autoscaling_config": autoscaling}


def declared(places: Sequence[Place], name: str, key_file: str) -> ServeDeploySchema:
    """The application as a config file of Ray Serve would name it: only there has it a policy of its own."""
    objectives = {label: list(seconds) for label, seconds in objectives_of(places).items()}
    policy = {"policy_function": _POLICY, "policy_kwargs": {"objectives": objectives}}
    models = [asdict(replace(place.config, api_key_file=key_file)) for place in places]
    alone = len(models) == 1
    application = ServeApplicationSchema(
        name=name,
        route_prefix="/",
        import_path=_BUILDER if alone else _BUILDER_OF_SEVERAL,
        args=models[0] if alone else {"models": models},
        autoscaling_policy=policy,
    )
    return ServeDeploySchema(applications=[application])


def apply(schema: ServeDeploySchema, name: str, deadline_s: float) -> None:
    """Deploy, or update what runs, and wait until all of it runs. Raises ClusterError with Serve's own words."""
    client = _get_global_client()
    assert client is not None, "serve.start comes first"
    client.deploy_apps(schema)
    while time.monotonic() < deadline_s:
        found = serve.status().applications.get(name)
        if found is not None and found.status == ApplicationStatus.RUNNING:
            return
        if found is not None and found.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise ClusterError(found.message.strip().splitlines()[-1] if found.message.strip() else found.status.value)
        time.sleep(_POLL_S)
    raise TimeoutError
