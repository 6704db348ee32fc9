"""Reading a corpus: any piece of any document, and the packed batch of any sequence number.

The manifest, the index and the tokenizer are checked when a corpus is opened; a shard's sha256 when the shard is
first read, once per process.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from farspan.batch import IGNORED_LABEL, PackedBatch
from farspan.data.manifest import CORPUS_MANIFEST, TOKENIZER_FOLDER, CorpusManifest
from farspan.data.mixture import document_weights
from farspan.data.pack import PackPlan, Piece
from farspan.data.shards import INDEX_FILE, INDEX_SCHEMA, Shard, read_batch
from farspan.errors import CorruptDataError, NotFoundError
from farspan.storage.door import open_store
from farspan.storage.local import LocalStore
from farspan.storage.manifest import FolderManifest, describe_file, read_manifest
from farspan.storage.publish import fetch_folder

_REBUILD = "run `farspan data build` again"


class Corpus:
    """An open corpus. Documents are numbered in the order of its shards. Safe to read from several threads."""

    def __init__(self, uri: str, folder: Path, published: FolderManifest, manifest: CorpusManifest) -> None:
        self.uri = uri
        self.manifest = manifest
        self._store = LocalStore(uri, folder)
        self._published = published
        self._shards: dict[int, Shard] = {}
        self._lock = threading.Lock()
        for entry in published.files:
            if not entry.path.startswith("shards/"):
                self._check(entry.path)
        index = read_batch(self._store.open_input(INDEX_FILE), INDEX_SCHEMA)
        self._shard_of = index.column("shard").to_numpy()
        self._row_of = index.column("row").to_numpy()
        self.document_lengths: np.ndarray = index.column("tokens").to_numpy().astype(np.int64)
        """Tokens of each document, the eos token included."""
        if self.document_lengths.size != manifest.documents or int(self.document_lengths.sum()) != manifest.tokens:
            raise CorruptDataError(uri, f"{INDEX_FILE} and {CORPUS_MANIFEST} disagree; {_REBUILD}")

    @property
    def tokenizer_folder(self) -> Path:
        """Local Hugging Face folder of the tokenizer."""
        return self._store.folder / TOKENIZER_FOLDER

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

    @property
    def eos_token_id(self) -> int:
        return self.manifest.eos_token_id

    @property
    def fingerprint(self) -> str:
        """Changes when any byte of the corpus's documents or tokenizer changes."""
        return hashlib.sha256(self.manifest.to_json().encode()).hexdigest()

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens start..stop of one document, uint32, a read-only view of the mapped shard.

        Raises:
            CorruptDataError: the document's shard is not the one that was built.
            IndexError: no such document or range.
        """
        if not 0 <= document < self.document_lengths.size:
            raise IndexError(f"document {document} of {self.document_lengths.size}")
        length = int(self.document_lengths[document])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"tokens {start}..{stop} of a document of {length}")
        return self._shard(int(self._shard_of[document])).tokens(int(self._row_of[document]), start, stop)

    def trained(self, document: int, start: int, stop: int) -> np.ndarray | None:
        """Which of tokens start..stop of a document are trained, as booleans; none: all of them.

        Raises:
            CorruptDataError: the document's shard is not the one that was built.
        """
        spans_N2 = self._shard(int(self._shard_of[document])).spans(int(self._row_of[document]))
        if spans_N2 is None:
            return None
        trained = np.zeros(int(self.document_lengths[document]), dtype=bool)
        for first, last in spans_N2:
            trained[first:last] = True
        return trained[start:stop]

    def _shard(self, number: int) -> Shard:
        with self._lock:
            if number not in self._shards:
                name = self.manifest.shards[number].file
                self._check(name)
                try:
                    self._shards[number] = Shard(self._store.open_input(name), chat=self.manifest.rule.format == "chat")
                except (ValueError, pa.ArrowInvalid) as problem:
                    raise CorruptDataError(self.uri, f"{name} is not a shard ({problem}); {_REBUILD}") from None
            return self._shards[number]

    def _check(self, name: str) -> None:
        entry = self._published.entry(name)
        if entry is None or describe_file(self._store.folder / name, name) != entry:
            raise CorruptDataError(self.uri, f"{name} is not the file that was built (sha256 differs); {_REBUILD}")


def open_corpus(uri: str, cache: Path) -> Corpus:
    """The corpus published at `uri`; from S3 it is first copied below `cache`.

    Raises:
        NotFoundError: no corpus is there.
        CorruptDataError: a file is missing, torn or altered.
        UnreachableError: the place does not answer.
    """
    try:
        folder = fetch_folder(uri, cache, contents=False)
    except NotFoundError:
        raise NotFoundError(uri, f"no corpus is there; run `farspan data build` with output={uri}") from None
    store = LocalStore(uri, folder)
    published = read_manifest(store)
    assert published is not None, "fetch_folder requires the manifest"
    if published.entry(CORPUS_MANIFEST) is None or published.entry(INDEX_FILE) is None:
        raise NotFoundError(uri, "the folder is published but is not a corpus; run `farspan data build`")
    return Corpus(uri, folder, published, CorpusManifest.from_json(uri, store.read_bytes(CORPUS_MANIFEST)))


class Reader:
    """Packed sequences of a corpus, by number: a pure function of (corpus, sequence_tokens, seed, index)."""

    def __init__(self, corpus: Corpus, sequence_tokens: int, seed: int) -> None:
        self.corpus = corpus
        weights = document_weights(corpus.manifest, corpus.document_lengths)
        self.plan = PackPlan(corpus.document_lengths, sequence_tokens, seed, weights)

    def batch(self, index: int) -> PackedBatch:
        """Sequence number `index`; `sample_ids` are the document numbers of its pieces."""
        return self.lay(self.plan.sequence(index))

    def lay(self, pieces: tuple[Piece, ...]) -> PackedBatch:
        """These pieces end to end, in this order, be they of one sequence or of several."""
        tokens = [self.corpus.tokens(piece.document, piece.start, piece.stop) for piece in pieces]
        trained = [self.corpus.trained(piece.document, piece.start, piece.stop) for piece in pieces]
        return pack(pieces, tokens, trained)


def pack(pieces: tuple[Piece, ...], tokens: list[np.ndarray], trained: Sequence[np.ndarray | None]) -> PackedBatch:
    """Lay pieces end to end. The last token of a piece has no label, also where its document goes on elsewhere: the
    rest begins the next sequence as a piece of its own, and what was before it is not visible there.

    A label is the next token, where that token is `trained` (none: all are).
    """
    tokens_T = torch.from_numpy(np.concatenate(tokens).astype(np.int64))
    labels_T = torch.full_like(tokens_T, IGNORED_LABEL)
    positions_T = torch.empty_like(tokens_T)
    bounds = [0]
    for piece, is_trained in zip(pieces, trained, strict=True):
        start, stop = bounds[-1], bounds[-1] + piece.num_tokens
        labels_T[start : stop - 1] = tokens_T[start + 1 : stop]
        if is_trained is not None:
            labels_T[start : stop - 1][torch.from_numpy(~is_trained[1:])] = IGNORED_LABEL
        positions_T[start:stop] = torch.arange(piece.num_tokens)
        bounds.append(stop)
    return PackedBatch(tokens_T, labels_T, positions_T, tuple(bounds), tuple(piece.document for piece in pieces))


def read_corpus_manifest(uri: str) -> CorpusManifest:
    """What the corpus at `uri` says of itself; nothing else is fetched.

    Raises:
        NotFoundError: no corpus is there.
    """
    store = open_store(uri)
    if read_manifest(store) is None or not store.exists(CORPUS_MANIFEST):
        raise NotFoundError(uri, f"no corpus is there; run `farspan data build` with output={uri}")
    return CorpusManifest.from_json(uri, store.read_bytes(CORPUS_MANIFEST))
