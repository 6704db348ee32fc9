"""Which checkpoints a run keeps."""

from __future__ import annotations

from collections.abc import Iterable

from farspan.config.schema import TrainConfig
from farspan.storage.door import open_store
from farspan.storage.local import LocalStore
from farspan.storage.manifest import MANIFEST_NAME
from farspan.storage.paths import join_uri


def expired(steps: Iterable[int], keep: int, every: int) -> list[int]:
    """The steps whose checkpoints go: all but the newest `keep`, and but the multiples of `every`. Pure.

    keep=0 keeps everything; every=0 keeps none beside the newest.
    """
    ordered = sorted(steps, reverse=True)
    if keep == 0:
        return []
    return [step for step in ordered[keep:] if not (every > 0 and step % every == 0)]


def remove_expired(output: str, train: TrainConfig, steps: Iterable[int]) -> list[int]:
    """Remove what `expired` names among a run's whole checkpoints; gives the steps that went."""
    gone = expired(steps, train.keep_checkpoints, train.keep_every)
    for step in gone:
        # The pieces last: a checkpoint without its manifest is not there, and asks for no pieces.
        remove_folder(join_uri(output, f"checkpoints/step-{step:08d}"))
        remove_folder(join_uri(output, f"shards/step-{step:08d}"))
    return gone


def remove_folder(uri: str) -> None:
    """Remove every file of a folder, manifests first: what is half removed is not there."""
    store = open_store(uri)
    for file in sorted(store.list(), key=lambda file: not file.path.endswith(MANIFEST_NAME)):
        store.delete(file.path)
    if isinstance(store, LocalStore) and store.folder.is_dir():
        for folder in sorted(store.folder.rglob("*"), reverse=True):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if not any(store.folder.iterdir()):
            store.folder.rmdir()
