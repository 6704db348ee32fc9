"""The application in a config file of Ray Serve, as KubeRay's RayService takes it: `farspan.cli.service:build`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from farspan.config.check import check_serve
from farspan.config.load import config_of
from farspan.config.schema import ServeConfig
from farspan.errors import ConfigError

if TYPE_CHECKING:
    from farspan.serve.keys import ApiKey


def build(args: dict[str, Any]) -> Any:
    """The endpoint for a ServeConfig written as `args`. Raises ConfigError for what is misspelt or not safe."""
    config = config_of(ServeConfig, args)
    check_serve(config)
    if config.api_key_file is None:
        raise ConfigError("api_key_file", "must be given in Serve's config", None, "mount a secret and name its file")
    from farspan.serve.app import build_app

    return build_app(config, _keys(config))


def _keys(config: ServeConfig) -> tuple[ApiKey, ...]:
    from farspan.serve.keys import keys_of

    assert config.api_key_file is not None
    mounted = Path(config.api_key_file)
    try:
        text = mounted.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        rule = f"must be a readable file ({type(problem).__name__})"
        raise ConfigError("api_key_file", rule, str(mounted), "mount the secret that holds the keys") from None
    # Its mode is not looked at: a mounted secret belongs to root and is readable by the pod's group, which in the pod
    # is this user alone.
    return keys_of(text, str(mounted))
