"""The architectures that every promise of the engine is held to, and the path that each of them takes."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from typing import Any

import pytest
from tests.support.double import DoublePrecision
from tests.support.zoo import zoo_model
from transformers import PreTrainedModel

PATHS = {
    "llama": "packed",
    "qwen2": "packed",
    "qwen3": "packed",
    "mistral": "packed",
    "mixtral": "packed",
    "gemma2": "packed",
    "gemma3_text": "packed",
    "phi": "packed",
    "gpt_neox": "packed",
    "gpt_oss": "packed",
    "qwen3_moe": "packed",
    "deepseek_v3": "packed",
    "llama4_text": "packed",
    "qwen3_next": "packed",
    "bamba": "packed",
    "lfm2": "packed",
    "falcon_h1": "packed",
    "jamba": "packed stepwise",
    "mamba": "packed stepwise",
    "mamba2": "packed",
    "stablelm": "alone",
}
# Something of a sequence is in no page: it cannot be set back, and pages alone do not bring it back.
WITH_STATES = frozenset({"qwen3_next", "bamba", "lfm2", "falcon_h1", "jamba", "mamba", "mamba2", "stablelm"})
# Nothing of them is in pages, or nothing at all.
WITHOUT_PAGES = ("mamba", "mamba2", "stablelm")
SETTINGS: dict[str, dict[str, Any]] = {"llama4_text": {"attn_temperature_tuning": False}, "gpt_neox": {"seed": 1}}


@functools.cache
def model_of(architecture: str) -> PreTrainedModel:
    with DoublePrecision():
        return zoo_model(architecture, **SETTINGS.get(architecture, {}))


def kinds(among: Iterable[str] = PATHS, *, core: Collection[str]) -> list[Any]:
    """Architectures as parameters; those outside of `core` are tried by `make test-long` only."""
    assert set(core) <= set(among)
    return [kind if kind in core else pytest.param(kind, marks=pytest.mark.long) for kind in among]
