"""Where a model lies, and the folder of this machine it is read from: itself, or a copy of what is on S3."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath

from farspan.errors import CheckpointError, UnreachableError
from farspan.models.checkpoint import WEIGHTS, WEIGHTS_INDEX
from farspan.storage.paths import LocalPlace, join_uri, parse_uri
from farspan.storage.publish import fetch_folder

PATIENCE_S = 120.0
SAFETENSORS = ".safetensors"
_KINDS = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_TEMPLATES = "additional_chat_templates"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MOST_TOLD = 5


def fetch_model(uri: str, cache: Path | None = None, *, weights: bool = True, patience_s: float = PATIENCE_S) -> Path:
    """A local folder with the model at `uri`, a path or an s3:// address.

    What is on S3 is copied once, below `cache` (none: `.cache/farspan/models` of this user), by one process at a time:
    config, tokenizer and (with `weights`) the safetensors files that make the model, nothing else. A place that does
    not answer is asked again for `patience_s`.

    Raises:
        CheckpointError: no model is there; what is.
        StorageError: it cannot be read, or kept here.
    """
    if isinstance(parse_uri(uri), LocalPlace):
        return fetch_folder(uri, Path(), require_manifest=False)

    def choose(names: list[str], read: Callable[[str], bytes]) -> list[str]:
        return [name for name in files_of_model(uri, names, read) if weights or not name.endswith(SAFETENSORS)]

    return fetch_folder(uri, cache or _cache(uri), require_manifest=False, choose=choose, patience_s=patience_s)


def files_of_model(uri: str, names: Collection[str], read: Callable[[str], bytes]) -> list[str]:
    """Of all files below `uri` those that make a model; `read` is asked for its index alone. Never a pickle.

    Raises:
        CheckpointError: they make none; what was found.
    """
    weights = _weights(uri, names, read)
    if "config.json" not in names:
        raise CheckpointError(uri, f"has no config.json, found {_told(names)}; give a Hugging Face model folder")
    return sorted({name for name in names if _describes(PurePosixPath(name))} | weights)


def _weights(uri: str, names: Collection[str], read: Callable[[str], bytes]) -> set[str]:
    # In the order in which a folder is opened.
    if WEIGHTS in names:
        return {WEIGHTS}
    if WEIGHTS_INDEX not in names:
        raise CheckpointError(uri, _without_weights(uri, names))
    shards = _shards(uri, read(WEIGHTS_INDEX))
    if absent := sorted(shards - set(names)):
        raise CheckpointError(uri, f"weight file {absent[0]} is missing; copy the folder again")
    return shards


def _shards(uri: str, index: bytes) -> set[str]:
    try:
        named = json.loads(index)["weight_map"].values()
        shards = {name for name in named if PurePosixPath(name).name == name and name.endswith(SAFETENSORS)}
        wrong = [name for name in named if name not in shards]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(uri, f"{WEIGHTS_INDEX} is not an index of weights; copy the folder again") from None
    if wrong or not shards:
        named = f"names {wrong[0]!r}, which is no safetensors file of the folder" if wrong else "names no file"
        raise CheckpointError(uri, f"{WEIGHTS_INDEX} {named}; convert the weights to safetensors")
    return shards


def _describes(path: PurePosixPath) -> bool:
    """Whether it is of a kind that config and tokenizer are written in, where transformers looks for them."""
    return path.suffix in _KINDS and str(path.parent) in (".", _TEMPLATES)


def _without_weights(uri: str, names: Collection[str]) -> str:
    deeper = sorted(
        str(PurePosixPath(name).parent) for name in names if name.endswith((f"/{WEIGHTS}", f"/{WEIGHTS_INDEX}"))
    )
    if deeper:
        return f"has no {WEIGHTS}; give {join_uri(uri, deeper[-1])}"
    pickled = sorted(name for name in names if name.endswith(_PICKLED))
    if pickled:
        return f"has only pickled weights ({pickled[0]}), which are never fetched; convert them to safetensors"
    return f"has no {WEIGHTS} or {WEIGHTS_INDEX}, found {_told(names)}; give a Hugging Face model folder"


def _told(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:_MOST_TOLD]) + (f" and {len(names) - _MOST_TOLD} more" * (len(names) > _MOST_TOLD))


def _cache(uri: str) -> Path:
    try:
        return Path.home() / ".cache" / "farspan" / "models"
    except RuntimeError:
        raise UnreachableError(uri, "this user has no home folder to keep a copy in; set HOME") from None
