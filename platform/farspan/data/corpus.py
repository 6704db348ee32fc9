"""Building a corpus: sources -> records -> tokens -> Arrow shards -> one published folder.

The same sources, tokenizer and settings give the same bytes, whatever the number of cores or processes, and also when
the build was killed on the way and went on.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from farspan.config.check import check_corpus
from farspan.config.load import dump_config
from farspan.config.schema import CorpusConfig
from farspan.data.chat import ChatEncoder
from farspan.data.encode import Encode, Encoded, EncodeTask, encode_here, read_batches, refuse_bad
from farspan.data.manifest import (
    CORPUS_MANIFEST,
    TOKENIZER_FOLDER,
    CorpusManifest,
    DocumentRule,
    Skipped,
    SourceShare,
)
from farspan.data.mixture import split_bounds
from farspan.data.records import file_kind
from farspan.data.shards import ShardWriter
from farspan.data.sources import SourceFile, find_files, sources_of
from farspan.data.tokenizer import TOKENIZER_FILE, copy_tokenizer, open_encoder, set_template, train_tokenizer
from farspan.data.workspace import Counts, Journal, resume, workspace
from farspan.errors import ConfigError
from farspan.storage.local import explained
from farspan.storage.manifest import describe_file
from farspan.storage.publish import check_publishable, publish_folder

TOO_SHORT = "shorter than min_tokens"
_EXAMPLES = 5
_REQUEST = "tokenizer_of"


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """How far a build is. `stage` is training (the tokenizer), encoding or publishing; `documents` are records read,
    `tokens` those written."""

    stage: str
    files: int
    total_files: int
    documents: int
    tokens: int


Report = Callable[[BuildProgress], None]


def build_corpus(config: CorpusConfig, progress: Report, encode: Encode = encode_here) -> CorpusManifest:
    """Build the corpus `config` describes and publish it, whole or not at all.

    A build that was killed goes on from its last finished shard. `encode` is who tokenizes: this process, or others.

    Raises:
        ConfigError: a config that cannot be built, or sources in which no document is long enough.
        NotFoundError: a source or the tokenizer is not there.
        UnreachableError: a source cannot be read or the output cannot be written.
        CorruptDataError: a packed file that is torn, or, with on_bad=fail, a bad record.
    """
    check_corpus(config)
    check_publishable(config.output)
    sources = sources_of(config)
    files = _enough(config, find_files([source.path for source in sources], config.pattern))
    with workspace(config.output) as place, explained(config.output, "building the corpus"):
        folder = place / "corpus"
        folder.mkdir(exist_ok=True)
        journal = _begin(config, files, folder, progress)
        manifest = _encode(config, files, journal, progress, encode)
        (folder / CORPUS_MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        progress(BuildProgress("publishing", len(files), len(files), journal.counts.records, manifest.tokens))
        publish_folder(folder, config.output, frozen=True)
    return manifest


def _enough(config: CorpusConfig, files: list[SourceFile]) -> list[SourceFile]:
    """The files of the first `max_documents` records, where that can be said without opening one."""
    if config.max_documents is None or any(file_kind(file.path) != "text" for file in files):
        return files
    return files[: config.max_documents]


def _begin(config: CorpusConfig, files: list[SourceFile], folder: Path, progress: Report) -> Journal:
    """The tokenizer is in place, and the journal knows what an earlier build of the same left."""
    tokenizer = folder / TOKENIZER_FOLDER
    asked = [dump_config(config), *(json.dumps(asdict(file)) for file in files)]
    if config.tokenizer is not None:
        copy_tokenizer(config.tokenizer, tokenizer)
        if config.chat_template is not None:
            set_template(config.chat_template, tokenizer)
    elif not (tokenizer / TOKENIZER_FILE).is_file() or not _same_request(folder, asked):
        train_tokenizer(_texts(config, files, folder, progress), config.vocab_size, tokenizer)
        (folder.parent / _REQUEST).write_text(_digest(asked), encoding="ascii")
    asked += [describe_file(file, file.name).sha256 for file in sorted(tokenizer.iterdir())]
    return resume(folder, _digest(asked))


def _same_request(folder: Path, asked: list[str]) -> bool:
    """Whether the tokenizer in `folder` was trained, to its end, on these files by this config."""
    file = folder.parent / _REQUEST
    return file.is_file() and file.read_text(encoding="ascii") == _digest(asked)


def _digest(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _texts(config: CorpusConfig, files: list[SourceFile], folder: Path, progress: Report) -> Iterator[str]:
    records = 0
    for batch in read_batches(EncodeTask(config, tuple(files), 0, 0, folder)):
        for _, _, record in batch:
            records += 1
            if config.max_documents is not None and records > config.max_documents:
                return
            if record.text:
                yield record.text
        if batch:
            progress(BuildProgress("training", batch[-1][0] + 1, len(files), records, 0))


def _encode(
    config: CorpusConfig, files: list[SourceFile], journal: Journal, progress: Report, encode: Encode
) -> CorpusManifest:
    counts = journal.counts
    tokenizer = journal.folder / TOKENIZER_FOLDER
    writer = ShardWriter(journal.folder, config.shard_tokens, chat=config.format == "chat", kept=tuple(journal.shards))
    task = EncodeTask(config, tuple(files[counts.file :]), counts.file, counts.record, tokenizer)
    for batch in encode(task):
        for answer in batch:
            if counts.records == config.max_documents:
                break
            _add(config, files[answer.file], answer, writer, counts)
            if writer.full:
                journal.write(writer.close_shard(), copy.deepcopy(counts))
        progress(BuildProgress("encoding", counts.file, len(files), counts.records, counts.tokens))
        if counts.records == config.max_documents:
            break
    writer.finish()
    if not writer.shards:
        reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(counts.skipped.items()))
        raise ConfigError("sources", f"must hold a usable document ({reasons})", config.sources, "lower min_tokens")
    return _manifest(config, journal, writer)


def _add(config: CorpusConfig, file: SourceFile, answer: Encoded, writer: ShardWriter, counts: Counts) -> None:
    """Write one record, as one document or cut into several, or count why not."""
    if config.on_bad == "fail":
        refuse_bad(answer)
    counts.file, counts.record = answer.file, answer.record + 1
    counts.records += 1
    num_tokens = len(answer.tokens)
    problem = answer.problem or (TOO_SHORT if num_tokens < config.min_tokens else None)
    if problem is not None:
        counts.skipped[problem] = counts.skipped.get(problem, 0) + 1
        if counts.skipped[problem] <= _EXAMPLES:
            counts.examples.setdefault(problem, []).append(answer.name)
        return
    bounds = split_bounds(num_tokens, config.split_tokens)
    parts = list(pairwise(bounds))
    for start, stop in parts:
        writer.add(answer.name, answer.tokens[start:stop], answer.spans_N2)
    source = str(file.source)
    counts.split += len(parts) > 1
    counts.tokens += num_tokens
    counts.source_documents[source] = counts.source_documents.get(source, 0) + len(parts)
    counts.source_tokens[source] = counts.source_tokens.get(source, 0) + num_tokens


def _manifest(config: CorpusConfig, journal: Journal, writer: ShardWriter) -> CorpusManifest:
    counts, folder = journal.counts, journal.folder / TOKENIZER_FOLDER
    encoder = open_encoder(folder, str(folder))
    return CorpusManifest(
        documents=sum(shard.documents for shard in writer.shards),
        tokens=counts.tokens,
        vocab_size=encoder.vocab_size,
        eos_token_id=encoder.eos_token_id,
        tokenizer_sha256=describe_file(folder / TOKENIZER_FILE, TOKENIZER_FILE).sha256,
        shards=tuple(writer.shards),
        skipped=tuple(
            Skipped(reason=reason, documents=number, examples=tuple(counts.examples[reason]))
            for reason, number in sorted(counts.skipped.items())
        ),
        sources=tuple(
            SourceShare(
                path=source.path,
                weight_hundredths=source.weight_hundredths,
                documents=counts.source_documents.get(str(number), 0),
                tokens=counts.source_tokens.get(str(number), 0),
            )
            for number, source in enumerate(sources_of(config))
        ),
        rule=_rule(config, counts, folder),
    )


def _rule(config: CorpusConfig, counts: Counts, tokenizer: Path) -> DocumentRule:
    chat = config.format == "chat"
    template = ChatEncoder(tokenizer, None, config.train_on).template if chat else None
    return DocumentRule(
        format=config.format,
        train_on=config.train_on if chat else None,
        template_sha256=hashlib.sha256(template.encode()).hexdigest() if template is not None else None,
        split_tokens=config.split_tokens,
        split=counts.split,
        upsample_min_tokens=config.upsample.min_tokens,
        upsample_hundredths=round(config.upsample.factor * 100),
    )
