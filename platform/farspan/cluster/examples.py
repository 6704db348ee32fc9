"""What the committed spec only shows: values that nobody can pull or read, found in manifests about to be applied."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from farspan.config.cluster import KubernetesConfig

_FIELDS = ("image", "cpu_image", "model", "corpus", "runs")
_WORD = re.compile(r"""[^\s'"]+""")


def examples_in(manifests: Any) -> dict[str, str]:
    """The fields of the spec whose example stands in the manifests, with it."""
    words = {word for text in _texts(manifests) for word in _WORD.findall(text)}
    examples = {f"kubernetes.{field}": getattr(KubernetesConfig(), field) for field in _FIELDS}
    return {field: value for field, value in examples.items() if any(_names(word, value) for word in words)}


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
