"""The application in a config file of Ray Serve, as KubeRay's RayService takes it: `farspan.cli.service:build`, and
`build_several` for several models behind one address.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from farspan.config.load import config_of
from farspan.config.schema import ServeConfig
from farspan.config.serve_rules import check_serve
from farspan.errors import ConfigError

if TYPE_CHECKING:
    from farspan.serve.keys import ApiKey


def build(args: dict[str, Any]) -> Any:
    """The endpoint for a ServeConfig written as `args`. Raises ConfigError for what is misspelt or not safe."""
    return _built([config_of(ServeConfig, args)])


def build_several(args: dict[str, Any]) -> Any:
    """The endpoint for several models, each a ServeConfig in the list `models`. Raises what `build` raises."""
    models = args.get("models")
    if set(args) != {"models"} or not isinstance(models, list) or not models:
        raise ConfigError(
            "args", "must be a list of configs named models", sorted(args), "write models: [{model: ...}]"
        )
    return _built([config_of(ServeConfig, model) for model in models])


def _built(configs: list[ServeConfig]) -> Any:
    for config in configs:
        check_serve(config)
    if configs[0].api_key_file is None:
        raise ConfigError("api_key_file", "must be given in Serve's config", None, "mount a secret and name its file")
    from farspan.serve.app import build_app

    return build_app(_keys(configs[0]), *configs)


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
