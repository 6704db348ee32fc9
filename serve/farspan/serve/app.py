"""Build the Serve application from a config, run it, and end it without leaving a process."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation, RequestRouterConfig
from ray.serve.exceptions import RayServeException

from farspan.config.check import check_serve
from farspan.config.schema import RoleConfig, ServeConfig
from farspan.engine.cut_plan import check_cut
from farspan.engine.probe import refuse_config
from farspan.errors import ClusterError, ConfigError
from farspan.models.checkpoint import open_config
from farspan.serve.agent import end_agents
from farspan.serve.api import Api
from farspan.serve.folder import open_model_folder
from farspan.serve.keys import ApiKey, read_keys
from farspan.serve.naming import ModelNames
from farspan.serve.port import refuse_taken_port
from farspan.serve.ranks import rank_options
from farspan.serve.router import Router
from farspan.serve.routes import build_http
from farspan.serve.scaling import apply, declared, is_scaled, replicas_of
from farspan.serve.sizing import as_metrics
from farspan.serve.ways import GuidedWays
from farspan.serve.worker import DecodeWorker, PrefillWorker

APP_NAME = "farspan"
_ROUTER = "farspan.serve.targeting.TargetedRouter"
_READY_POLL_S = 0.1
_REQUESTS_PER_SEQUENCE = 4
# Nearly nothing, but more than the head of a cluster offers: an endpoint must not end with the head.
_INGRESS_CPUS = 0.01


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers."""

    url: str
    """Base address of the OpenAI API, ending in /v1."""
    model: str
    api_key_file: str


def model_name(config: ServeConfig) -> str:
    """What clients call the model."""
    return config.name or config.model.rstrip("/").rpartition("/")[2]


def check_app(config: ServeConfig) -> Path:
    """Refuse what cannot be served before anything starts; the local model folder.

    Raises ConfigError, CheckpointError, StorageError or ModelError in one sentence.
    """
    check_serve(config)
    folder = open_model_folder(config.model)
    _refuse_model(config, folder)
    # Said again where a config file of Serve's begins: it must never be a replica that finds out.
    ModelNames(model_name(config), config.engine.adapters)
    refuse_taken_port(config.host, config.port)
    return folder


def _refuse_model(config: ServeConfig, folder: Path) -> None:
    model = open_config(folder)
    refuse_config(model)
    if config.engine.tensor_parallel > 1:
        check_cut(model, config.engine.tensor_parallel)


class Ingress(Api):
    """The `Api` over the handles of the deployments."""

    def __init__(
        self, config: ServeConfig, model_name: str, keys: tuple[ApiKey, ...], prefill: Any, decode: Any
    ) -> None:
        router = Router(prefill, decode)
        self._guided = GuidedWays(router, config)
        super().__init__(config, model_name, keys, router, self._guided)

    async def check_health(self) -> None:
        """Asked by Serve before the first request, and again and again."""
        self._guided.listen()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve's autoscaler is told."""
        self._guided.listen()
        return as_metrics(self._guided.guide.signals(self._metrics.num_open))

    def __del__(self) -> None:
        # Absent when the model could not be opened.
        if hasattr(self, "_spans"):
            self.close()


def build_app(config: ServeConfig, keys: tuple[ApiKey, ...]) -> Any:
    """The Serve application: ingress over prefill and decode workers."""
    ModelNames(model_name(config), config.engine.adapters)
    workers = [
        serve.deployment(PrefillWorker).options(name="prefill", **_options(config.prefill, config)).bind(config),
        serve.deployment(DecodeWorker).options(name="decode", **_options(config.decode, config)).bind(config),
    ]
    ingress = serve.deployment(serve.ingress(build_http)(Ingress)).options(
        name="api",
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": _INGRESS_CPUS},
        health_check_period_s=2,
        graceful_shutdown_wait_loop_s=0.1,
        **_lasting(config),
        **replicas_of(RoleConfig(), config),
    )
    return ingress.bind(config, model_name(config), keys, *workers)


def _options(role: RoleConfig, config: ServeConfig) -> dict[str, Any]:
    return {
        "max_ongoing_requests": config.engine.max_sequences * _REQUESTS_PER_SEQUENCE,
        "ray_actor_options": {"num_cpus": role.cpus, "num_gpus": role.gpus, "resources": dict(role.custom)},
        # What a constructor refuses (a model that fails its self-check) it refuses every time.
        "max_constructor_retry_count": 2,
        "health_check_period_s": 2,
        "graceful_shutdown_wait_loop_s": 0.1,
        "request_router_config": RequestRouterConfig(request_router_class=_ROUTER),
        **_lasting(config),
        **replicas_of(role, config),
        **rank_options(role, config),
    }


def _lasting(config: ServeConfig) -> dict[str, Any]:
    """How a replica ends: when its answers are given, and in an update not before another is there."""
    return {"graceful_shutdown_timeout_s": config.drain_s, "max_surge_percent": 100}


@contextmanager
def run_app(config: ServeConfig) -> Iterator[Running]:
    """A running server for the time of the block, on the Ray this process is connected to.

    Raises:
        ConfigError, CheckpointError, StorageError: before anything starts.
        ClusterError: the application did not become ready within start_timeout_s.
    """
    check_app(config)
    keys, key_file = read_keys(config)
    deadline_s = time.monotonic() + config.start_timeout_s
    try:
        _deploy(config, keys, str(key_file), deadline_s)
        url = f"http://{_in_url(config.host)}:{config.port}"
        _wait_ready(url, deadline_s, config.start_timeout_s)
        yield Running(f"{url}/v1", model_name(config), str(key_file))
    finally:
        serve.shutdown()
        end_agents()


def update_app(config: ServeConfig, running: Running) -> None:
    """Replace what runs by what `config` says now, worker by worker: no answer is lost, no request refused.

    Raises:
        ConfigError, CheckpointError, StorageError, ModelError: nothing was changed.
        ClusterError: the new workers did not come; the old ones go on.
    """
    check_serve(config)
    _refuse_model(config, open_model_folder(config.model))
    keys, key_file = read_keys(config)
    if f"http://{_in_url(config.host)}:{config.port}/v1" != running.url:
        raise ConfigError("port", "stays what it was while a server runs", config.port, "start another server")
    _deploy(config, keys, str(key_file), time.monotonic() + config.start_timeout_s)


def num_cpus(config: ServeConfig) -> float:
    """Logical CPUs the replicas ask Ray for."""
    each = sum((role.max_replicas or role.replicas) * role.cpus for role in (config.prefill, config.decode))
    return each * config.engine.tensor_parallel


def _deploy(config: ServeConfig, keys: tuple[ApiKey, ...], key_file: str, deadline_s: float) -> None:
    # serve.run has no deadline of its own.
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="deploy")
    try:
        serve.start(
            # Whoever reaches a node with a worker reaches the endpoint, also while there is no head.
            proxy_location=ProxyLocation.EveryNode,
            http_options=HTTPOptions(
                host=config.host, port=config.port, request_timeout_s=config.request_timeout_s, keep_alive_timeout_s=75
            ),
        )
        if is_scaled(config):
            deployed = pool.submit(apply, declared(config, APP_NAME, key_file), APP_NAME, deadline_s)
        else:
            deployed = pool.submit(serve.run, build_app(config, keys), name=APP_NAME, route_prefix="/")
        deployed.result(timeout=max(1.0, deadline_s - time.monotonic()))
    except TimeoutError:
        raise ClusterError(
            f"the workers did not start within start_timeout_s={config.start_timeout_s:g}: {_status()}; raise it, or "
            "ask for fewer replicas or CPUs"
        ) from None
    except (RayError, RayServeException, ClusterError, RuntimeError, ValueError) as problem:
        raise ClusterError(f"the workers could not start: {_status() or _last_line(problem)}") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _status() -> str:
    """The last line of what Serve says is wrong with each deployment."""
    try:
        found = serve.status().applications.get(APP_NAME)
    except (RayError, RayServeException, RuntimeError):
        return ""
    if found is None:
        return ""
    said = {name: d.message.strip().splitlines() for name, d in found.deployments.items() if d.message.strip()}
    return "; ".join(f"{name}: {lines[-1].strip()}" for name, lines in said.items())


def _last_line(problem: Exception) -> str:
    """What an error of Ray's comes down to: its text is a traceback of the other process."""
    lines = str(problem).strip().splitlines()
    return lines[-1].strip() if lines else type(problem).__name__


def _wait_ready(url: str, deadline_s: float, timeout_s: float) -> None:
    last = "no answer"
    # Not through the proxy of the environment: no other machine reaches this one's loopback.
    with httpx.Client(trust_env=False, timeout=15.0) as client:
        while time.monotonic() < deadline_s:
            try:
                answer = client.get(f"{url}/ready")
                if answer.status_code == 200:
                    return
                last = answer.text[:200]
            except httpx.HTTPError as problem:
                last = type(problem).__name__
            time.sleep(_READY_POLL_S)
    raise ClusterError(f"{url} was not ready within start_timeout_s={timeout_s:g} ({last}); is the port in use?")


def _in_url(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
