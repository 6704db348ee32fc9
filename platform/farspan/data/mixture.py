"""How often an epoch holds each document: what its source and its length ask for, in hundredths."""

from __future__ import annotations

import numpy as np

from farspan.data.manifest import CorpusManifest


def document_weights(manifest: CorpusManifest, lengths: np.ndarray) -> np.ndarray:
    """weight of each document in hundredths, int64; `lengths` in tokens, in the order of the corpus."""
    shares = [np.full(source.documents, source.weight_hundredths, np.int64) for source in manifest.sources]
    weights = np.concatenate([np.empty(0, np.int64), *shares])
    is_long = lengths >= manifest.rule.upsample_min_tokens
    # The config has refused products that are no whole hundredths.
    return np.where(is_long, weights * manifest.rule.upsample_hundredths // 100, weights)


def split_bounds(num_tokens: int, split_tokens: int | None) -> list[int]:
    """Where a text of `num_tokens` is cut: 0, ..., num_tokens, into the fewest parts of at most `split_tokens`.

    Parts differ by one token at most, so that no short rest is left over.
    """
    parts = -(-num_tokens // split_tokens) if split_tokens is not None else 1
    return [num_tokens * part // parts for part in range(parts + 1)]
