"""Small corpora made on the spot, from this repository's own sources."""

from __future__ import annotations

from pathlib import Path

from farspan.config.schema import CorpusConfig
from farspan.data.corpus import build_corpus

REPOSITORY = Path(__file__).resolve().parents[2]


def small_corpus(folder: Path, *, vocab_size: int = 300, documents: int = 12) -> str:
    """Publish a corpus of a few short documents under `folder`; gives its URI."""
    output = folder / "corpus"
    build_corpus(
        CorpusConfig(
            sources=[str(REPOSITORY / "platform" / "farspan" / "config")],
            output=str(output),
            vocab_size=vocab_size,
            max_documents=documents,
        ),
        lambda progress: None,
    )
    return str(output)
