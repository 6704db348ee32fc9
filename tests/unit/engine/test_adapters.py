"""Requests with different adapters and with none share a batch; each gets what peft gives it alone."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.double import DoublePrecision
from tests.support.s3 import S3Bucket
from tests.support.zoo import zoo_model
from tests.unit.engine.adapted import (
    ATTENTION,
    TARGETS,
    ask,
    assert_greedy,
    base_of,
    logits_of,
    lora,
    opened,
    rows,
    save,
    save_three,
)
from tests.unit.engine.oracle import chunked_logits
from tests.unit.engine.tiny import engine_config

from farspan.engine.engine import Engine
from farspan.engine.request import SamplingParams
from farspan.engine.runner import Piece
from farspan.engine.terms import PLAIN_TERMS, Terms
from farspan.errors import CheckpointError, ConfigError, EngineError, FarspanError, NotFoundError, RequestError

PATHS = {"jamba": "packed stepwise", "stablelm": "alone"}
NAMES = ["law", "poems", "", "code"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory):
    """The three adapters of an architecture, made once."""

    @functools.cache
    def make(architecture: str) -> dict[str, str]:
        with DoublePrecision():
            return save_three(tmp_path_factory.mktemp(architecture), architecture)

    return make


@pytest.mark.parametrize("architecture", TARGETS)
def test_logits_of_batches_of_three_adapters_and_none_equal_peft_for_every_chunk_size(architecture, folders):
    with DoublePrecision():
        engine = Engine(base_of(architecture), engine_config(adapters=folders(architecture)))
        assert engine.path == PATHS.get(architecture, "packed")
        prompts = rows(40, 9, 13, 11)
        models = [opened(architecture, folders(architecture).get(name)) for name in NAMES]
        wanted = [logits_of(model, prompt) for model, prompt in zip(models, prompts, strict=True)]
        base = logits_of(models[2], prompts[0])
        assert float((wanted[0] - base).norm() / base.norm()) > 0.1, "an adapter without effect"
        for chunk, most in ((1, 15), (7, 40), (16, 40)):
            cut = [prompt[:most] for prompt in prompts]
            for row, position, logits_V in chunked_logits(engine, cut, chunk, NAMES):
                error = float((logits_V - wanted[row][position]).abs().max())
                assert error <= 1e-8 * max(1.0, float(wanted[row][position].abs().max())), (chunk, row, position)
        engine.check_integrity()
