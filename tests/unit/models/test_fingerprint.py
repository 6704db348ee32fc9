"""Two folders have one fingerprint exactly where they answer alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.serve.tiny_folder import write_tiny_model

from farspan.errors import CheckpointError
from farspan.models.fingerprint import fingerprint_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fingerprint") / "model"
    write_tiny_model(folder)
    return folder


def retrained(folder: Path) -> None:
    """One matrix is another, of the same shape."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[-2]
    tensors[name] = torch.randn_like(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


def ends_elsewhere(folder: Path) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 5}))


def asks_otherwise(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")


@pytest.mark.parametrize("change", [retrained, ends_elsewhere, asks_otherwise])
def test_what_answers_depend_on_changes_it(model: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    assert fingerprint_folder(copy) == fingerprint_folder(model)
    change(copy)
    assert fingerprint_folder(copy) != fingerprint_folder(model)


def test_a_report_beside_the_model_is_nothing_to_it_and_a_folder_without_weights_is_refused(
    model: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    (copy / "evaluation.json").write_text("{}")
    assert fingerprint_folder(copy) == fingerprint_folder(model)
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        fingerprint_folder(copy)
