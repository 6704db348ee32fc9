"""A checkpoint's weights as an ordinary Hugging Face folder."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel

from farspan.errors import CheckpointError, ConfigError
from farspan.models.checkpoint import check_model_folder, load_causal_lm, load_tokenizer, save_causal_lm
from farspan.models.lora import is_adapter_folder, merge_folder, read_base
from farspan.storage.publish import fetch_folder, publish_folder
from farspan.train.checkpoint import list_checkpoints

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
        model = _open_model(folder, Path(scratch), DTYPES[dtype])
        out = Path(scratch) / "out"
        save_causal_lm(out, model.config, model.state_dict(), load_tokenizer(folder))
        publish_folder(out, output)
    return used


def _open_model(folder: Path, scratch: Path, dtype: torch.dtype) -> PreTrainedModel:
    if not is_adapter_folder(folder):
        check_model_folder(folder, tokenizer=True)
        return load_causal_lm(folder, dtype)
    base = fetch_folder(read_base(folder), scratch / "base", require_manifest=False)
    # Merged in fp32: an update is smaller than bf16's steps between large weights.
    return merge_folder(load_causal_lm(base, torch.float32), folder).to(dtype)


def _checkpoint_of(source: str) -> str:
    checkpoints = list_checkpoints(source)
    if checkpoints:
        return checkpoints[0]
    if not source.rstrip("/"):
        raise CheckpointError(source, "is not a folder")
    return source
