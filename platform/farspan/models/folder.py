"""A model with its tokenizer, as a local folder of whichever machine asks."""

from __future__ import annotations

from pathlib import Path

from farspan.errors import CheckpointError
from farspan.models.address import fetch_model
from farspan.models.checkpoint import check_model_folder


def open_model_folder(uri: str) -> Path:
    """A complete local folder (config, safetensors, tokenizer) for a local path or s3:// address.

    Raises:
        CheckpointError: the folder cannot be served, and why.
        StorageError: it cannot be read.
    """
    if "://" not in uri:
        # First: its sentence says what is missing from a model, not what is missing from storage.
        check_model_folder(Path(uri), tokenizer=True)
        return fetch_model(uri)
    folder = fetch_model(uri)
    try:
        check_model_folder(folder, tokenizer=True)
    except CheckpointError as problem:
        # Of the address the user wrote, not of our copy.
        raise CheckpointError(uri, problem.reason) from None
    return folder
