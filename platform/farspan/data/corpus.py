"""Building a corpus: sources -> tokenizer -> Arrow shards -> one published folder.

The same sources, tokenizer and settings give the same bytes, whatever the machine's number of cores.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from farspan.config.check import check_corpus
from farspan.config.schema import CorpusConfig
from farspan.data.manifest import CORPUS_MANIFEST, TOKENIZER_FOLDER, CorpusManifest, Skipped
from farspan.data.shards import ShardWriter
from farspan.data.sources import Document, find_documents
from farspan.data.tokenizer import TOKENIZER_FILE, Encoder, copy_tokenizer, open_encoder, train_tokenizer
from farspan.errors import ConfigError
from farspan.storage.local import explained
from farspan.storage.manifest import describe_file
from farspan.storage.paths import LocalPlace, parse_uri
from farspan.storage.publish import check_publishable, publish_folder
from farspan.storage.staging import staging_folder

NOT_UTF8 = "not UTF-8"
EMPTY = "empty"
TOO_SHORT = "shorter than min_tokens"

_BATCH_DOCUMENTS = 64
_READERS = 8
_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """How far a build is. `stage` is training (the tokenizer), encoding or publishing; `tokens` those written."""

    stage: str
    documents: int
    total_documents: int
    tokens: int


Report = Callable[[BuildProgress], None]


def build_corpus(config: CorpusConfig, progress: Report) -> CorpusManifest:
    """Build the corpus `config` describes and publish it, whole or not at all.

    Raises:
        ConfigError: a config that cannot be built, or sources in which no document is long enough.
        NotFoundError: a source or the tokenizer is not there.
        UnreachableError: a source cannot be read or the output cannot be written.
    """
    check_corpus(config)
    check_publishable(config.output)
    documents = find_documents(config.sources, config.pattern)[: config.max_documents]
    with _workspace(config.output) as folder, explained(config.output, "building the corpus"):
        encoder = _prepare_tokenizer(config, documents, folder / TOKENIZER_FOLDER, progress)
        manifest = _encode(config, documents, encoder, folder, progress)
        (folder / CORPUS_MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        progress(BuildProgress("publishing", len(documents), len(documents), manifest.tokens))
        publish_folder(folder, config.output, frozen=True)
    return manifest


@contextmanager
def _workspace(output: str) -> Iterator[Path]:
    """Where the corpus grows: beside a local output, so that publishing links files instead of copying them."""
    place = parse_uri(output)
    if isinstance(place, LocalPlace):
        with explained(output, "making a place to build in"), staging_folder(place.folder) as folder:
            yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="farspan-corpus-") as name:
            yield Path(name)


def _prepare_tokenizer(config: CorpusConfig, documents: list[Document], folder: Path, progress: Report) -> Encoder:
    if config.tokenizer is not None:
        copy_tokenizer(config.tokenizer, folder)
        return open_encoder(folder, config.tokenizer)
    done = 0

    def texts() -> Iterator[str]:
        nonlocal done
        for batch in _read(documents):
            yield from (text for _, text in batch if text)
            done += len(batch)
            progress(BuildProgress("training", done, len(documents), 0))

    train_tokenizer(texts(), config.vocab_size, folder)
    return open_encoder(folder, str(folder))


def _encode(
    config: CorpusConfig, documents: list[Document], encoder: Encoder, folder: Path, progress: Report
) -> CorpusManifest:
    writer = ShardWriter(folder, config.shard_tokens)
    skipped: dict[str, list[str]] = {}
    done = tokens = 0
    for batch in _read(documents):
        readable = []
        for document, text in batch:
            if text:
                readable.append((document, text))
            else:
                skipped.setdefault(NOT_UTF8 if text is None else EMPTY, []).append(document.name)
        answers = encoder.encode([text for _, text in readable])
        for (document, _), ids in zip(readable, answers, strict=True):
            if len(ids) + 1 < config.min_tokens:
                skipped.setdefault(TOO_SHORT, []).append(document.name)
                continue
            writer.add(document.name, [*ids, encoder.eos_token_id])
            tokens += len(ids) + 1
        done += len(batch)
        progress(BuildProgress("encoding", done, len(documents), tokens))
    writer.finish()
    if not writer.shards:
        reasons = ", ".join(f"{len(names)} {reason}" for reason, names in sorted(skipped.items()))
        raise ConfigError("sources", f"must hold a usable document ({reasons})", config.sources, "lower min_tokens")
    return CorpusManifest(
        documents=sum(shard.documents for shard in writer.shards),
        tokens=tokens,
        vocab_size=encoder.vocab_size,
        eos_token_id=encoder.eos_token_id,
        tokenizer_sha256=describe_file(folder / TOKENIZER_FOLDER / TOKENIZER_FILE, TOKENIZER_FILE).sha256,
        shards=tuple(writer.shards),
        skipped=tuple(
            Skipped(reason=reason, documents=len(names), examples=tuple(names[:_EXAMPLES]))
            for reason, names in sorted(skipped.items())
        ),
    )


def _read(documents: Sequence[Document]) -> Iterator[list[tuple[Document, str | None]]]:
    """Documents with their texts, in order; None for one that is not UTF-8. A document that cannot be read raises."""
    with ThreadPoolExecutor(_READERS, thread_name_prefix="corpus-reader") as pool:
        for start in range(0, len(documents), _BATCH_DOCUMENTS):
            batch = documents[start : start + _BATCH_DOCUMENTS]
            yield list(zip(batch, pool.map(_text, batch), strict=True))


def _text(document: Document) -> str | None:
    try:
        return document.read().decode("utf-8")
    except UnicodeDecodeError:
        return None
