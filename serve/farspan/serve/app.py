"""Build the Serve application from a config, run it, and end it without leaving a process."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation, RequestRouterConfig
from ray.serve.exceptions import RayServeException

from farspan.config.schema import RoleConfig, ServeConfig
from farspan.config.serve_rules import check_serve
from farspan.engine.cut_plan import check_cut
from farspan.engine.draft_folder import check_draft
from farspan.engine.probe import refuse_config
from farspan.errors import ClusterError, ConfigError
from farspan.models.checkpoint import load_tokenizer, open_config
from farspan.models.folder import open_model_folder
from farspan.serve.agent import end_agents
from farspan.serve.ingress import MOST_OPEN, Alone, Together
from farspan.serve.keys import ApiKey, read_keys
from farspan.serve.lineup import Place, line_up
from farspan.serve.listener import CLOSING_S, KEEP_ALIVE_S
from farspan.serve.messages import WorkerInfo
from farspan.serve.port import refuse_taken_port
from farspan.serve.ranks import rank_options
from farspan.serve.routes import build_http
from farspan.serve.scaling import apply, declared, is_scaled, replicas_of
from farspan.serve.worker import DecodeWorker, PrefillWorker

APP_NAME = "farspan"
_ROUTER = "farspan.serve.targeting.TargetedRouter"
_READY_POLL_S = 0.1
_TOLD_S = 10.0
_REQUESTS_PER_SEQUENCE = 4
# Nearly nothing, but more than the head of a cluster offers: an endpoint must not end with the head.
_INGRESS_CPUS = 0.01
# Three checks in a row that nobody answers end a replica: one that is frozen has another in its place in 40 s.
_HEALTH = {"health_check_period_s": 2, "health_check_timeout_s": 10}


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers."""

    url: str
    """Base address of the OpenAI API, ending in /v1."""
    model: str
    """Its name, or those of all its models."""
    api_key_file: str
    transport: str
    """By what KV pages travel between its workers, and why."""
    listener: str = "proxy"
    """Who listens, as the config says it."""


def check_app(config: ServeConfig, *more: ServeConfig) -> Path:
    """Refuse what cannot be served before anything starts; the local folder of the (first) model.

    Raises ConfigError, CheckpointError, StorageError or ModelError in one sentence.
    """
    folder, *_ = _checked_folders((config, *more))
    refuse_taken_port(config.host, config.port)
    return folder


def _checked_folders(configs: Sequence[ServeConfig]) -> list[Path]:
    for config in configs:
        check_serve(config)
    # Said again where a config file of Serve's begins: it must never be a replica that finds out.
    line_up(configs)
    folders = [open_model_folder(config.model) for config in configs]
    for config, folder in zip(configs, folders, strict=True):
        model = open_config(folder)
        refuse_config(model)
        if config.engine.tensor_parallel > 1:
            check_cut(model, config.engine.tensor_parallel)
        if config.engine.draft_model is not None:
            check_draft(config.engine.draft_model, model, load_tokenizer(folder))
    return folders


def build_app(keys: tuple[ApiKey, ...], *configs: ServeConfig) -> Any:
    """The Serve application: ingress over the prefill and decode workers of each model."""
    places, scaled = line_up(configs), is_scaled(*configs)
    workers = [worker for place in places for worker in _workers(place, scaled=scaled)]
    ingress = serve.deployment(serve.ingress(build_http)(Alone if len(places) == 1 else Together)).options(
        name="api",
        max_ongoing_requests=MOST_OPEN * len(places),
        ray_actor_options={"num_cpus": _INGRESS_CPUS},
        graceful_shutdown_wait_loop_s=0.1,
        **_HEALTH,
        # Serve does not see the answers of one that listens itself: it waits until that has closed.
        **_lasting(max(config.drain_s for config in configs) + (CLOSING_S if _listens(configs[0]) else 0.0)),
        **replicas_of(RoleConfig(), configs[0], scaled=scaled),
    )
    return ingress.bind(places[0] if len(places) == 1 else places, keys, *workers)


def _workers(place: Place, *, scaled: bool) -> list[Any]:
    """The deployments of one model."""
    config, beside = place.config, place.num_beside
    return [
        serve.deployment(kind)
        .options(name=f"{kind.role}{place.label}", **_options(role, config, scaled=scaled))
        .bind(config, beside)
        for kind, role in ((PrefillWorker, config.prefill), (DecodeWorker, config.decode))
    ]


def _options(role: RoleConfig, config: ServeConfig, *, scaled: bool) -> dict[str, Any]:
    return {
        "max_ongoing_requests": config.engine.max_sequences * _REQUESTS_PER_SEQUENCE,
        "ray_actor_options": {"num_cpus": role.cpus, "num_gpus": role.gpus, "resources": dict(role.custom)},
        # What a constructor refuses (a model that fails its self-check) it refuses every time.
        "max_constructor_retry_count": 2,
        **_HEALTH,
        "graceful_shutdown_wait_loop_s": 0.1,
        "request_router_config": RequestRouterConfig(request_router_class=_ROUTER),
        **_lasting(config.drain_s),
        **replicas_of(role, config, scaled=scaled),
        **rank_options(role, config),
    }


def _lasting(drain_s: float) -> dict[str, Any]:
    """How a replica ends: when its answers are given, and in an update not before another is there."""
    return {"graceful_shutdown_timeout_s": drain_s, "max_surge_percent": 100}


@contextmanager
def run_app(config: ServeConfig, *more: ServeConfig) -> Iterator[Running]:
    """A running server for the time of the block, on the Ray this process is connected to; of several models, where
    there are more configs.

    Raises:
        ConfigError, CheckpointError, StorageError: before anything starts.
        ClusterError: the application did not become ready within start_timeout_s.
    """
    check_app(config, *more)
    _refuse_several_machines(config)
    keys, key_file = read_keys(config)
    timeout_s = max(each.start_timeout_s for each in (config, *more))
    deadline_s = time.monotonic() + timeout_s
    try:
        _deploy((config, *more), keys, str(key_file), deadline_s)
        url = f"http://{_in_url(config.host)}:{config.port}"
        _wait_ready(url, deadline_s, timeout_s)
        places = line_up((config, *more))
        names = ", ".join(place.name for place in places)
        yield Running(f"{url}/v1", names, str(key_file), "; ".join(map(_told_transport, places)), config.listener)
    finally:
        serve.shutdown()
        end_agents()


def update_app(running: Running, config: ServeConfig, *more: ServeConfig) -> None:
    """Replace what runs by what the configs say now, worker by worker: no answer is lost, no request refused.

    Raises:
        ConfigError, CheckpointError, StorageError, ModelError: nothing was changed.
        ClusterError: the new workers did not come; the old ones go on.
    """
    _checked_folders((config, *more))
    keys, key_file = read_keys(config)
    if f"http://{_in_url(config.host)}:{config.port}/v1" != running.url:
        raise ConfigError("port", "stays what it was while a server runs", config.port, "start another server")
    if config.listener != running.listener:
        # Serve starts its proxies once, or never.
        raise ConfigError("listener", "stays what it was while a server runs", config.listener, "start another server")
    timeout_s = max(each.start_timeout_s for each in (config, *more))
    _deploy((config, *more), keys, str(key_file), time.monotonic() + timeout_s)


def _listens(config: ServeConfig) -> bool:
    """Whether the ingress does, and no proxy of Serve's."""
    return config.listener == "ingress"


def _refuse_several_machines(config: ServeConfig) -> None:
    if _listens(config) and (count := sum(node["Alive"] for node in ray.nodes())) > 1:
        raise ConfigError(
            "listener",
            f"must be proxy on a cluster of several machines ({count} here): nobody knows where the ingress will run",
            config.listener,
            "use listener=proxy",
        )


def num_cpus(*configs: ServeConfig) -> float:
    """Logical CPUs the replicas ask Ray for."""
    return sum(
        role.most * role.cpus * config.engine.tensor_parallel
        for config in configs
        for role in (config.prefill, config.decode)
    )


def _deploy(configs: Sequence[ServeConfig], keys: tuple[ApiKey, ...], key_file: str, deadline_s: float) -> None:
    config = configs[0]
    # serve.run has no deadline of its own.
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="deploy")
    try:
        serve.start(
            # Whoever reaches a node with a worker reaches the endpoint, also while there is no head.
            proxy_location=ProxyLocation.Disabled if _listens(config) else ProxyLocation.EveryNode,
            http_options=HTTPOptions(
                host=config.host,
                port=config.port,
                request_timeout_s=config.proxy_timeout_s,
                keep_alive_timeout_s=KEEP_ALIVE_S,
            ),
        )
        if is_scaled(*configs):
            deployed = pool.submit(apply, declared(line_up(configs), APP_NAME, key_file), APP_NAME, deadline_s)
        else:
            deployed = pool.submit(serve.run, build_app(keys, *configs), name=APP_NAME, route_prefix="/")
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


def handle_for_threads(deployment: str) -> Any:
    """A handle that may be used where no event loop runs, whatever Ray's switches say of those inside replicas."""
    handle = serve.get_deployment_handle(deployment, app_name=APP_NAME)
    # A process has one handle of a deployment, however often it asks.
    if not handle.is_initialized:
        handle._init(_run_router_in_separate_loop=True)
    return handle


def _told_transport(place: Place) -> str:
    """By what the KV pages of one model travel, as a worker of it says."""
    whose = f"{place.name}: " if place.label else ""
    try:
        handle = handle_for_threads(f"{DecodeWorker.role}{place.label}")
        # To all: a call to any would start one where there is none.
        told = handle.broadcast("info").results(timeout_s=_TOLD_S, return_exceptions=True)
    except (RayError, RayServeException, TimeoutError):
        told = []
    for info in told:
        if isinstance(info, WorkerInfo):
            return f"{whose}{info.transport} ({info.transport_reason})"
    return f"{whose}transfer.transport={place.config.transfer.transport}, no worker runs that says more"


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
                # Waiting mends nothing: workers stay what they are.
                if last.startswith('{"status":"mismatched"'):
                    raise ClusterError(f"the workers do not fit together: {last}")
            except httpx.HTTPError as problem:
                last = type(problem).__name__
            time.sleep(_READY_POLL_S)
    raise ClusterError(f"{url} was not ready within start_timeout_s={timeout_s:g} ({last}); is the port in use?")


def _in_url(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
