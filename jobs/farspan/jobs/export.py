"""A checkpoint's weights as an ordinary Hugging Face folder."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from farspan.errors import CheckpointError, ConfigError
from farspan.models.address import fetch_model
from farspan.models.checkpoint import (
    check_model_folder,
    load_causal_lm,
    load_tokenizer,
    open_config,
    random_causal_lm,
    save_causal_lm,
)
from farspan.models.lora import is_adapter_folder, merge_folder, read_base
from farspan.storage.publish import fetch_folder, publish_folder
from farspan.train.checkpoint import list_checkpoints, open_whole

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_checkpoint(source: str, output: str, dtype: str) -> str:
    """Publish `source` (a checkpoint, or a run whose newest one is taken) to `output`; gives the source used.

    An adapter is merged into the model it was trained beside.

    Raises:
        ConfigError: unknown dtype. CheckpointError: nothing to export.
    """
    if dtype not in DTYPES:
        raise ConfigError("--dtype", f"must be one of {', '.join(DTYPES)}", dtype, "use float32")
    used = _checkpoint_of(source)
    with tempfile.TemporaryDirectory(prefix="farspan-export-") as scratch:
        folder = fetch_folder(used, Path(scratch) / "in", require_manifest=False)
        model = _open_model(used, folder, Path(scratch), DTYPES[dtype])
        out = Path(scratch) / "out"
        save_causal_lm(out, model.config, model.state_dict(), load_tokenizer(folder))
        publish_folder(out, output)
    return used


def _open_model(uri: str, folder: Path, scratch: Path, dtype: torch.dtype) -> PreTrainedModel:
    pieces = open_whole(uri, folder, scratch / "pieces")
    if pieces is not None:
        return _assembled(folder, pieces).to(dtype)
    if not is_adapter_folder(folder):
        check_model_folder(folder, tokenizer=True)
        return load_causal_lm(folder, dtype)
    base = fetch_model(read_base(folder))
    # Merged in fp32: an update is smaller than bf16's steps between large weights.
    return merge_folder(load_causal_lm(base, torch.float32), folder).to(dtype)


def _assembled(folder: Path, weights: dict[str, Tensor]) -> PreTrainedModel:
    model = random_causal_lm(open_config(folder), 0)
    held = model.load_state_dict(weights, strict=False, assign=False)
    # A tied head is the embedding itself and is kept once.
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - dict(model.named_parameters()).keys()
    if wrong := [*sorted(set(held.missing_keys) - tied), *held.unexpected_keys]:
        raise CheckpointError(str(folder), f"its pieces do not fit config.json: {wrong[:3]}")
    return model


def _checkpoint_of(source: str) -> str:
    checkpoints = list_checkpoints(source)
    if checkpoints:
        return checkpoints[0]
    if not source.rstrip("/"):
        raise CheckpointError(source, "is not a folder")
    return source
