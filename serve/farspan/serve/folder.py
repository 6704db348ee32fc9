"""The model folder a deployment serves, on whichever machine asks."""

from __future__ import annotations

from pathlib import Path

from farspan.errors import UnreachableError
from farspan.models.checkpoint import check_model_folder
from farspan.storage.publish import fetch_folder


def open_model_folder(uri: str) -> Path:
    """A complete local folder (config, safetensors, tokenizer) for a local path or s3:// address.

    Raises:
        CheckpointError: the folder cannot be served, and why.
        StorageError: it cannot be read.
    """
    # Only what lies elsewhere is copied: a local folder needs no home.
    cache = Path()
    if "://" not in uri:
        # First: its sentence says what is missing from a model, not what is missing from storage.
        check_model_folder(Path(uri), tokenizer=True)
    else:
        try:
            cache = Path.home() / ".cache" / "farspan" / "models"
        except RuntimeError:
            raise UnreachableError(uri, "this user has no home folder to keep a copy in; set HOME") from None
    folder = fetch_folder(uri, cache, require_manifest=False)
    check_model_folder(folder, tokenizer=True)
    return folder
