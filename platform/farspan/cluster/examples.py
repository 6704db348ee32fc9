"""What the committed spec only shows: values that are nobody's, in manifests about to be applied or in a spec."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import Any

from farspan.config.cluster import ClusterSpec, KubernetesConfig

_FIELDS = ("image", "cpu_image", "model", "corpus", "runs")
_ZEROS = re.compile(r"(?<![1-9a-f])0{12,17}\b")
_ZEROED = ("account", "image", "subnet", "security_group")
_PROJECT = "your-project"
# Addresses that stand in documents and on no machine (RFC 5737, RFC 3849).
_DOCUMENTS = tuple(
    ipaddress.ip_network(network) for network in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32")
)
_WORD = re.compile(r"""[^\s'"]+""")


def examples_in(manifests: Any) -> dict[str, str]:
    """The fields of the spec whose example stands in the manifests, with it."""
    words = {word for text in _texts(manifests) for word in _WORD.findall(text)}
    examples = {f"kubernetes.{field}": getattr(KubernetesConfig(), field) for field in _FIELDS}
    return {field: value for field, value in examples.items() if any(_names(word, value) for word in words)}


def examples_of(spec: ClusterSpec, provider: str) -> dict[str, str]:
    """The fields of a spec that are still examples and that a provider of Ray's launcher would be asked for."""
    if provider == "aws":
        values = {f"aws.{field}": getattr(spec.aws, field) for field in _ZEROED}
        return {field: value for field, value in values.items() if _ZEROS.search(value)}
    if provider == "gcp":
        values = {"gcp.project": spec.gcp.project, "gcp.image": spec.gcp.image}
        return {field: value for field, value in values.items() if _PROJECT in value.split("/")}
    values = {"local.head": spec.local.head, "local.workers": ", ".join(filter(_in_documents, spec.local.workers))}
    return {field: value for field, value in values.items() if _in_documents(value.partition(", ")[0])}


def _in_documents(machine: str) -> bool:
    try:
        address = ipaddress.ip_address(machine)
    except ValueError:
        return False
    return any(address in network for network in _DOCUMENTS)


def _names(word: str, value: str) -> bool:
    return word == value or word.startswith(f"{value}/")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, str):
        yield value
