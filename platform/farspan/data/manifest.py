"""What a corpus is: `manifest.json` in its folder, beside `tokenizer/` and `shards/`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from farspan.errors import CorruptDataError
from farspan.storage.paths import check_relative

CORPUS_MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """One Arrow file. `file` is relative to the corpus, `size` in bytes."""

    file: str
    documents: int
    tokens: int
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """Documents that are not in the corpus, by reason, and the first of them as examples."""

    reason: str
    documents: int
    examples: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceShare:
    """What one source of the config holds: its documents follow those of the sources before it.

    An epoch holds each of them `weight_hundredths` / 100 times.
    """

    path: str
    weight_hundredths: int
    documents: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentRule:
    """How records became documents.

    `template_sha256` is that of the chat template; `split_tokens` the most a document may have (none: any), and
    `split` how many records were cut for it. Documents of `upsample_min_tokens` or more tokens are in an epoch
    `upsample_hundredths` / 100 times as often as their source says.
    """

    format: str = "text"
    train_on: str | None = None
    template_sha256: str | None = None
    split_tokens: int | None = None
    split: int = 0
    upsample_min_tokens: int = 1
    upsample_hundredths: int = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusManifest:
    """Totals count what is in the shards; `skipped` what is not; together they are every record found,
    but that a record that was cut is several documents."""

    documents: int
    tokens: int
    vocab_size: int
    eos_token_id: int
    tokenizer_sha256: str
    shards: tuple[ShardInfo, ...]
    skipped: tuple[Skipped, ...]
    sources: tuple[SourceShare, ...]
    rule: DocumentRule

    @property
    def num_skipped(self) -> int:
        return sum(entry.documents for entry in self.skipped)

    def to_json(self) -> str:
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_json(uri: str, data: bytes) -> CorpusManifest:
        """Read a manifest.

        Raises:
            CorruptDataError: not a manifest of this version, or totals that its shards do not add up to.
        """
        try:
            content: dict[str, Any] = json.loads(data)
            if (version := content.pop("version")) != _VERSION:
                raise ValueError(f"version {version} is not {_VERSION}")
            content["shards"] = tuple(ShardInfo(**shard) for shard in content["shards"])
            content["skipped"] = tuple(
                Skipped(reason=entry["reason"], documents=entry["documents"], examples=tuple(entry["examples"]))
                for entry in content["skipped"]
            )
            content["sources"] = tuple(SourceShare(**entry) for entry in content["sources"])
            content["rule"] = DocumentRule(**content["rule"])
            manifest = CorpusManifest(**content)
            if sum(shard.tokens for shard in manifest.shards) != manifest.tokens:
                raise ValueError("the shards' tokens do not add up")
            if sum(shard.documents for shard in manifest.shards) != manifest.documents:
                raise ValueError("the shards' documents do not add up")
            if sum(source.documents for source in manifest.sources) != manifest.documents:
                raise ValueError("the sources' documents do not add up")
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            reason = f"{CORPUS_MANIFEST} is not a corpus manifest ({problem}); run farspan data build again"
            raise CorruptDataError(uri, reason) from None
        for shard in manifest.shards:
            check_relative(uri, shard.file)
        return manifest
