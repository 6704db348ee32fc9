"""Rules between fields of an engine and of what serves it, torch-free.

Each rule raises one `ConfigError` that names the nearest legal value.
"""

from __future__ import annotations

import ipaddress
import math
import re

from farspan.config.bounds import above, at_least, custom_resources, one_of, within
from farspan.config.schema import EngineConfig, RoleConfig, ServeConfig
from farspan.errors import ConfigError

SERVE_DTYPES = ("bfloat16", "float32", "float64")
TOOL_FORMATS = ("auto", "hermes", "llama3")
TRANSPORTS = ("auto", "nixl", "object_store")
LISTENERS = ("proxy", "ingress")
SPLITS = ("predicted", "always")
# A worker whose stream says nothing for seconds counts as frozen.
_LONGEST_INTERVAL_S = 1.0


def check_engine(engine: EngineConfig) -> None:
    """Refuse engine settings that no model could make legal."""
    one_of("engine.dtype", engine.dtype, SERVE_DTYPES)
    at_least("engine.page_tokens", engine.page_tokens, 1)
    at_least("engine.kv_bytes", engine.kv_bytes, 1024)
    at_least("engine.max_batch_tokens", engine.max_batch_tokens, 1)
    at_least("engine.max_sequences", engine.max_sequences, 1)
    at_least("engine.graph_rows", engine.graph_rows, 0)
    at_least("engine.offload_bytes", engine.offload_bytes, 0)
    at_least("engine.host_cache_bytes", engine.host_cache_bytes, 0)
    at_least("engine.draft_tokens", engine.draft_tokens, 0)
    if engine.draft_model is not None and engine.draft_tokens == 0:
        rule, way_out = "needs engine.draft_tokens of at least 1", "use engine.draft_tokens=4 or leave it out"
        raise ConfigError("engine.draft_model", rule, engine.draft_model, way_out)
    for field in ("prefill_tokens", "decode_tokens"):
        if (quota := getattr(engine, field)) is not None:
            at_least(f"engine.{field}", quota, 1)
    for name in engine.adapters:
        check_adapter_name(name)
    at_least("engine.adapter_bytes", engine.adapter_bytes, 1)
    at_least("engine.threads", engine.threads, 0)
    check_ranks(engine)


def check_ranks(engine: EngineConfig) -> None:
    """Refuse what an engine of several ranks does not do."""
    at_least("engine.tensor_parallel", engine.tensor_parallel, 1)
    if engine.tensor_parallel == 1:
        return
    for field, value, legal, why in (
        ("engine.offload_bytes", engine.offload_bytes, 0, "each rank has pages of its own heads alone"),
        ("engine.host_cache_bytes", engine.host_cache_bytes, 0, "each rank has pages of its own heads alone"),
        ("engine.adapters", dict(engine.adapters), {}, "adapters are not cut over ranks"),
        ("engine.draft_model", engine.draft_model, None, "a draft model is not cut over ranks"),
    ):
        if value != legal:
            raise ConfigError(
                field,
                f"does not go with engine.tensor_parallel={engine.tensor_parallel}: {why}",
                value,
                f"leave {field} out or use engine.tensor_parallel=1",
            )


def check_adapter_name(name: str) -> None:
    """Refuse a name that a request could not say everywhere."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name):
        raise ConfigError(
            "engine.adapters",
            "names must begin with a letter or digit and hold only those, '.', '_' and '-', at most 128",
            name,
            "choose another name",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_serve(config: ServeConfig) -> None:
    """Refuse a serving config that no model could make legal."""
    check_engine(config.engine)
    one_of("transfer.transport", config.transfer.transport, TRANSPORTS)
    one_of("transfer.split", config.transfer.split, SPLITS)
    _check_role("prefill", config.prefill)
    _check_role("decode", config.decode)
    _check_objectives(config)
    above("transfer.deadline_s", config.transfer.deadline_s, 0)
    above("transfer.lease_s", config.transfer.lease_s, config.transfer.deadline_s)
    at_least("transfer.colocate_below_tokens", config.transfer.colocate_below_tokens, 0)
    at_least("max_body_bytes", config.max_body_bytes, 1)
    above("body_timeout_s", config.body_timeout_s, 0)
    within("stream_interval_s", config.stream_interval_s, 0, _LONGEST_INTERVAL_S)
    one_of("tool_format", config.tool_format, TOOL_FORMATS)
    above("prefill.cpus", config.prefill.cpus, 0)
    above("decode.cpus", config.decode.cpus, 0)
    custom_resources("prefill.custom", config.prefill.custom)
    custom_resources("decode.custom", config.decode.custom)
    above("start_timeout_s", config.start_timeout_s, 0)
    above("request_timeout_s", config.request_timeout_s, 0)
    one_of("listener", config.listener, LISTENERS)
    if not 1 <= config.port <= 65535:
        raise ConfigError("port", "must lie in 1..65535", config.port, "use port=8000")
    _check_collector(config.telemetry.otlp_endpoint)


def _check_collector(address: str | None) -> None:
    if address is not None and not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s?#]*)?", address):
        way_out = "use telemetry.otlp_endpoint=http://collector:4318"
        raise ConfigError(
            "telemetry.otlp_endpoint", "must be an http(s) address without user or query", address, way_out
        )


def _check_role(name: str, role: RoleConfig) -> None:
    # None at first, where there may be none later.
    at_least(f"{name}.replicas", role.replicas, 0 if role.min_replicas == 0 else 1)
    if role.min_replicas is not None:
        within(f"{name}.min_replicas", role.min_replicas, 0, role.replicas)
    if role.max_replicas is not None:
        at_least(f"{name}.max_replicas", role.max_replicas, max(1, role.replicas))


def _check_objectives(config: ServeConfig) -> None:
    for field, seconds in (
        ("objectives.first_token_s", config.objectives.first_token_s),
        ("objectives.token_s", config.objectives.token_s),
        ("scaling.measure_s", config.scaling.measure_s),
    ):
        above(field, seconds, 0)
    if config.objectives.max_wait_s is not None:
        above("objectives.max_wait_s", config.objectives.max_wait_s, 0)
    for field, seconds in (
        ("scaling.up_s", config.scaling.up_s),
        ("scaling.down_s", config.scaling.down_s),
        ("scaling.to_zero_s", config.scaling.to_zero_s),
        ("drain_s", config.drain_s),
    ):
        within(field, seconds, 0, math.inf)
