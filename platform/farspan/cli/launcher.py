"""A launcher file in front of the pinned Ray's own checks, and of ours."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

from farspan.cluster.check_launcher import launcher_problems, shape_problems
from farspan.config.cluster import SoftwareConfig


def problems(config: dict[str, Any], software: SoftwareConfig) -> list[str]:
    """Everything wrong with a launcher file, one sentence each. Needs no network."""
    # What has another shape Ray cannot read, and what Ray cannot read has no parts to look into.
    return shape_problems(config) or _ray_problems(config) or launcher_problems(config, software)


def _ray_problems(config: dict[str, Any]) -> list[str]:
    import jsonschema
    import ray
    from ray._private.label_utils import validate_node_label_syntax
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        # It prints a warning for every mount that is a file; ours are meant to be.
        with contextlib.redirect_stdout(io.StringIO()):
            validate_config(prepare_config(copy.deepcopy(config)))
    except SystemExit:
        # Ray's way to end its own command.
        return ["ray refuses it: a local cluster names head_ip and worker_ips, and no node types"]
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, jsonschema.ValidationError) as problem:
        return [f"ray refuses it: {str(problem).splitlines()[0]}"]
    for name, node_type in config.get("available_node_types", {}).items():
        try:
            validate_node_label_syntax(node_type.get("labels", {}))
        except ValueError as problem:
            return [f"{name}: {problem}"]
    wanted = f"ray[serve,train]=={ray.__version__}"
    if not any(wanted in command for command in config.get("setup_commands", [wanted])):
        return [f"the nodes install another Ray than this machine's {ray.__version__}"]
    return []
