"""What an answer depends on, as a digest that is kept with it: the same digest, the same question to the same model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from farspan.config.schema import EngineConfig
from farspan.engine.adapter_folder import fingerprint_adapter
from farspan.engine.request import Grammar, SamplingParams
from farspan.models.fingerprint import fingerprint_folder

# Two questions are compared at a time: of other ones, one pair in 2**64 looks the same.
_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Origin:
    """The model and adapters that answer."""

    model: str = ""
    """Differs between models, and between settings of the engine that change answers."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Name -> what differs between adapters."""

    def digest(self, adapter: str, kind: str, words: Any, params: SamplingParams) -> str:
        """Of one question, as JSON has it."""
        if params.temperature == 0:
            # Nothing is drawn: the place in the file is nothing to the answer.
            params = replace(params, seed=0, request=0)
        # What is at its default is left out: a parameter that comes with a later version changes no digest.
        said = {f.name: getattr(params, f.name) for f in fields(params) if getattr(params, f.name) != f.default}
        whole = [self.model, adapter, self.adapters.get(adapter, ""), kind, words, said]
        return hashlib.sha256(json.dumps(whole, default=_plain).encode()).hexdigest()[:_DIGITS]


def origin_of(folder: Path, config: EngineConfig) -> Origin:
    """The same for every copy of the model's folder.

    Raises:
        CheckpointError: a folder without model or adapter.
        StorageError: an adapter cannot be read.
    """
    # Of the settings these alone change answers.
    model = f"{fingerprint_folder(folder)} {config.dtype} {config.max_context_tokens}"
    return Origin(model, {name: fingerprint_adapter(uri) for name, uri in config.adapters.items()})


def _plain(value: object) -> Any:
    if isinstance(value, Grammar):
        return asdict(value)
    assert isinstance(value, frozenset), f"{value!r} is no parameter"
    return sorted(value)
