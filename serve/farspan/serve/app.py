"""Build the Serve application from a config, run it, and end it without leaving a process."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation

from farspan.config.check import check_serve
from farspan.config.schema import RoleConfig, ServeConfig
from farspan.errors import ClusterError
from farspan.serve.api import Api, build_http
from farspan.serve.folder import open_model_folder
from farspan.serve.keys import key_hashes
from farspan.serve.worker import DecodeWorker, PrefillWorker

APP_NAME = "farspan"
_STATE = Path.home() / ".cache" / "farspan" / "serve"
# Ray's own switches: no usage report to the network, no upload of the working folder under `uv run`.
_RAY_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
_READY_POLL_S = 0.1
_REQUESTS_PER_SEQUENCE = 4


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

    Raises ConfigError, CheckpointError or StorageError in one sentence.
    """
    check_serve(config)
    return open_model_folder(config.model)


def build_app(config: ServeConfig, hashes: tuple[str, ...]) -> Any:
    """The Serve application: ingress over prefill and decode workers."""
    workers = [
        serve.deployment(PrefillWorker).options(name="prefill", **_options(config.prefill, config)).bind(config),
        serve.deployment(DecodeWorker).options(name="decode", **_options(config.decode, config)).bind(config),
    ]
    ingress = serve.deployment(serve.ingress(build_http)(Api)).options(
        name="api",
        num_replicas=1,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=5,
    )
    return ingress.bind(config, model_name(config), hashes, *workers)


def _options(role: RoleConfig, config: ServeConfig) -> dict[str, Any]:
    return {
        "num_replicas": role.replicas,
        "max_ongoing_requests": config.engine.max_sequences * _REQUESTS_PER_SEQUENCE,
        "ray_actor_options": {"num_cpus": role.cpus, "num_gpus": role.gpus},
        "health_check_period_s": 2,
        "graceful_shutdown_wait_loop_s": 0.1,
        "graceful_shutdown_timeout_s": 5,
    }


@contextmanager
def run_app(config: ServeConfig, address: str | None = None) -> Iterator[Running]:
    """A running server for the time of the block.

    `address` is a running Ray cluster; without it, a Ray that is already connected is used, or a local one is
    started and ended with the block.

    Raises:
        ConfigError, CheckpointError, StorageError: before anything starts.
        ClusterError: the application did not become ready within start_timeout_s.
    """
    check_app(config)
    hashes, key_file = key_hashes(config, _STATE)
    deadline_s = time.monotonic() + config.start_timeout_s
    with _connected(config, address):
        try:
            _deploy(config, hashes, deadline_s)
            url = f"http://{_in_url(config.host)}:{config.port}"
            _wait_ready(url, deadline_s, config.start_timeout_s)
            yield Running(f"{url}/v1", model_name(config), str(key_file))
        finally:
            serve.shutdown()


def serve_forever(
    config: ServeConfig, address: str | None = None, on_ready: Callable[[Running], None] | None = None
) -> None:
    """Serve until Ctrl-C or SIGTERM, then end everything that was started."""
    try:
        with run_app(config, address) as running, _termination() as stop:
            if on_ready is not None:
                on_ready(running)
            while not stop.wait(timeout=1.0):
                continue
    except KeyboardInterrupt:
        # Ctrl-C is how a server is told to end; everything is down by now.
        return


@contextmanager
def _termination() -> Iterator[threading.Event]:
    """An event that SIGTERM sets. Entered once Ray runs, because Ray puts a handler of its own in place."""
    stop = threading.Event()

    def end(_signal: int, _frame: FrameType | None) -> None:
        stop.set()

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _connected(config: ServeConfig, address: str | None) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    needed = config.prefill.replicas * config.prefill.cpus + config.decode.replicas * config.decode.cpus
    # Logical CPUs: what the replicas ask for must fit, whatever the machine has.
    local = {} if address else {"num_cpus": max(os.cpu_count() or 1, int(needed) + 1), "include_dashboard": False}
    added = {name: value for name, value in _RAY_ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
        yield
    except ConnectionError as problem:
        raise ClusterError(f"no Ray answers at {address}: {problem}; start one with `ray start --head`") from None
    finally:
        ray.shutdown()
        for name in added:
            os.environ.pop(name, None)


def _deploy(config: ServeConfig, hashes: tuple[str, ...], deadline_s: float) -> None:
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(
            host=config.host, port=config.port, request_timeout_s=config.request_timeout_s, keep_alive_timeout_s=75
        ),
    )
    # serve.run has no deadline of its own.
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="deploy")
    deployed = pool.submit(serve.run, build_app(config, hashes), name=APP_NAME, route_prefix="/")
    try:
        deployed.result(timeout=max(1.0, deadline_s - time.monotonic()))
    except concurrent.futures.TimeoutError:
        raise ClusterError(
            f"the workers did not start within start_timeout_s={config.start_timeout_s:g}: {_status()}; raise it, or "
            "ask for fewer replicas or CPUs"
        ) from None
    except (RayError, RuntimeError) as problem:
        raise ClusterError(f"the workers could not start: {_status() or problem}") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _status() -> str:
    """The last line of what Serve says is wrong with each deployment."""
    found = serve.status().applications.get(APP_NAME)
    if found is None:
        return ""
    said = {name: d.message.strip().splitlines() for name, d in found.deployments.items() if d.message.strip()}
    return "; ".join(f"{name}: {lines[-1].strip()}" for name, lines in said.items())


def _wait_ready(url: str, deadline_s: float, timeout_s: float) -> None:
    last = "no answer"
    while time.monotonic() < deadline_s:
        try:
            answer = httpx.get(f"{url}/ready", timeout=15.0)
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
