"""Ray's own switches that every node of every cluster gets, and what a node installs."""

from __future__ import annotations

from farspan.config.cluster import SoftwareConfig

AUTH = {"RAY_AUTH_MODE": "token"}
# With Ray's defaults a silent network partition is noticed after more than a minute, and its tasks are not retried.
# A node is given up after three checks that each waited three seconds, a second apart. What ran on it then still has
# time to begin elsewhere within half a minute.
WATCHES = {
    "RAY_grpc_client_keepalive_time_ms": "10000",
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}
# No upload of the working folder under `uv run`, no usage report to the network. Answers go from an ingress to Serve's
# proxy as messages of one connection, each of which costs half of what an object of Ray does; and a process of Serve's
# has one event loop, not three that wake one another for each of them.
HABITS = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}


# What a node needs for TLS. The authority's key is not among them: whoever has it can make nodes.
TLS_FILES = ("ca.crt", "node.crt", "node.key")


def tls_switches(folder: str) -> dict[str, str]:
    """Ray's own switches that turn TLS on, for a node or driver that has the files in `folder`."""
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": f"{folder}/node.crt",
        "RAY_TLS_SERVER_KEY": f"{folder}/node.key",
        "RAY_TLS_CA_CERT": f"{folder}/ca.crt",
    }


def requirements(software: SoftwareConfig) -> tuple[str, ...]:
    """What pip installs beside the wheel, pinned."""
    return (
        f"ray[serve,train]=={software.ray}",
        f"torch=={software.torch}",
        f"transformers=={software.transformers}",
        f"nixl=={software.nixl}",
    )


def wheel(software: SoftwareConfig) -> str:
    """File name of farspan's wheel."""
    return f"farspan-{software.farspan}-py3-none-any.whl"
