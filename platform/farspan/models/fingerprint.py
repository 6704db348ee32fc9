"""What tells two model folders apart, without reading all of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from farspan.models.checkpoint import check_model_folder, weight_files

# What an answer depends on beside the weights; a folder may hold anything else.
_DESCRIBING = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
_PIECES, _PIECE_BYTES = 4, 256


def fingerprint_folder(folder: Path) -> str:
    """Differs where config, tokenizer or weights do, of which a sample of each tensor is read; the same of a copy.

    Raises CheckpointError: an incomplete folder.
    """
    check_model_folder(folder)
    digest = hashlib.sha256()
    for file in (folder / name for name in _DESCRIBING):
        if file.is_file():
            content = file.read_bytes()
            digest.update(f"{file.name} {len(content)} ".encode() + content)
    for name in weight_files(folder):
        digest.update(_sample(folder / name))
    return digest.hexdigest()


def _sample(file: Path) -> bytes:
    """Digest of a safetensors file's names, shapes and types, and of a few bytes of each tensor."""
    with file.open("rb") as opened:
        length = opened.read(8)
        header = opened.read(int.from_bytes(length, "little"))
        digest = hashlib.sha256(header)
        for name, entry in json.loads(header).items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            for piece in range(_PIECES):
                opened.seek(len(length) + len(header) + start + (end - start) * piece // _PIECES)
                digest.update(opened.read(min(_PIECE_BYTES, end - start)))
    return digest.digest()
