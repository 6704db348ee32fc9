"""Files for Ray's cluster launcher, as text with its comments: users read them, and `ray up` takes them as they are."""

from __future__ import annotations

from pathlib import Path

import jinja2

from farspan.cluster.environment import AUTH, HABITS, TLS_FILES, WATCHES, requirements, tls_switches, wheel
from farspan.config.cluster import ClusterSpec
from farspan.errors import ConfigError

PROVIDERS = ("aws", "gcp", "local")
_TEMPLATES = Path(__file__).parent / "templates"
# Names of the node types, in the order of the file; the section of the spec each is read from.
NODE_TYPES = {"head": "head", "cpu": "cpu", "gpu-train": "train", "prefill": "prefill", "decode": "decode"}


def render_launcher(spec: ClusterSpec, provider: str) -> str:
    """The launcher file of one provider."""
    if provider not in PROVIDERS:
        raise ConfigError("--on", f"must be one of {', '.join(PROVIDERS)}", provider, "use --on aws")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        # The output is YAML for a shell, not a page.
        autoescape=False,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    types = {name: getattr(spec, section) for name, section in NODE_TYPES.items()}
    return environment.get_template(f"{provider}.yaml.jinja").render(
        spec=spec,
        types=types,
        num_workers=sum(nodes.max_nodes for name, nodes in types.items() if name != "head"),
        requirements=" ".join(f"'{requirement}'" for requirement in requirements(spec.software)),
        wheel=wheel(spec.software),
        auth=AUTH,
        tls_files=TLS_FILES if spec.tls_folder is not None else (),
        tls=tls_switches("$HOME/farspan-tls") if spec.tls_folder is not None else {},
        switches=[*_pairs(WATCHES), *_pairs(HABITS)],
    )


def _pairs(switches: dict[str, str]) -> list[str]:
    """Two NAME=VALUE on each line."""
    words = [f"{name}={value}" for name, value in switches.items()]
    return [" ".join(words[i : i + 2]) for i in range(0, len(words), 2)]
