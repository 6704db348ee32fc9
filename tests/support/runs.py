"""Tiny training configs, and what ranks do with them."""

from __future__ import annotations

from typing import Any

from farspan.config.load import load_config
from farspan.config.schema import RunConfig
from farspan.telemetry.events import EventBody, StepReport

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": "true",
}


def tiny_run(corpus: str, output: str, *overrides: str, **settings: Any) -> RunConfig:
    """A float64 Llama of a few thousand weights on 64-token sequences."""
    chosen = {**TINY, **settings}
    return load_config(
        RunConfig,
        None,
        [
            f"data.corpus={corpus}",
            f"output={output}",
            "data.sequence_tokens=64",
            "model.dtype=float64",
            "train.steps=4",
            "train.loss_tile_tokens=10",
            "optim.warmup_steps=2",
            *[f"model.settings.{name}={value}" for name, value in chosen.items()],
            *overrides,
        ],
    )


Curve = dict[int, tuple[float, str]]


def curve(events: list[EventBody]) -> Curve:
    """Step -> (loss, hash of what was consumed); of a step done twice, both must agree."""
    steps: Curve = {}
    for event in events:
        if isinstance(event, StepReport):
            assert steps.setdefault(event.step, (event.loss, event.samples)) == (event.loss, event.samples)
    return steps
