"""Where pages of an engine go on after their sequence, or outside of its pool: what the config asks for, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from farspan.config.schema import EngineConfig
from farspan.engine.path import Path
from farspan.errors import ConfigError
from farspan.kv.host_cache import BlockCache, HostCache
from farspan.kv.host_traffic import HostTraffic
from farspan.kv.layout import KvLayout
from farspan.kv.offload import PageOffload
from farspan.kv.prefix import PrefixCache
from farspan.memory.host import DramTier


def prefix_cache(path: Path, config: EngineConfig) -> PrefixCache | None:
    """None for a model with states: pages alone do not bring its state back."""
    return PrefixCache(path.pool) if config.prefix_cache and path.states is None else None


def host_traffic(
    path: Path,
    config: EngineConfig,
    prefix: PrefixCache | None,
    host_cache: Callable[[KvLayout], BlockCache] | None,
    clock: Callable[[], float],
) -> HostTraffic | None:
    if not config.host_cache_bytes:
        return None
    if prefix is None:
        raise ConfigError(
            "engine.host_cache_bytes",
            f"must be 0 for a model or a config that finds no pages again (path: {path.name})",
            config.host_cache_bytes,
            "leave it out, or set engine.prefix_cache=true for a model without a state per sequence",
        )
    layout = path.pool.layout
    if host_cache is not None:
        return HostTraffic(path.pool, prefix, partial(host_cache, layout), clock)
    own = HostCache.alone(config.host_cache_bytes, layout.page_bytes)
    return HostTraffic(path.pool, prefix, lambda: own, clock)


def page_offload(path: Path, config: EngineConfig) -> PageOffload | None:
    if not config.offload_bytes:
        return None
    if not path.pages_are_all:
        raise ConfigError(
            "engine.offload_bytes",
            f"must be 0 for a model that keeps all or part of a sequence outside of pages (path: {path.name})",
            config.offload_bytes,
            "leave it out: preempted sequences are computed again",
        )
    return PageOffload(path.pool, DramTier(config.offload_bytes, device=path.pool.device))
