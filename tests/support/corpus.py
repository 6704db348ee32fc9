"""Small corpora of text that no edit of the project changes."""

from __future__ import annotations

import random
from pathlib import Path

from farspan.config.schema import CorpusConfig
from farspan.data.corpus import build_corpus

REPOSITORY = Path(__file__).resolve().parents[2]
_SUBJECTS = ("the river", "a tall ship", "her brother", "the old clock", "every winter", "a stranger", "the city")
_VERBS = ("remembers", "carries", "follows", "never finds", "waits for", "returns to", "writes about")
_OBJECTS = ("the sea", "a letter", "seven stones", "the road north", "a quiet house", "its own name", "the first light")
_ENDS = (".", ", and the wind turns.", "; nobody asks why.", " until morning.", " (page {number}).")


def small_texts(folder: Path, *, documents: int = 7, seed: int = 0) -> Path:
    """Write `documents` files of 2 to 20 thousand characters, the same on every machine and in every year."""
    draw = random.Random(seed)
    texts = folder / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    for document in range(documents):
        sentences = [_sentence(draw, number) for number in range(draw.randint(50, 500))]
        (texts / f"{document:03}.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    return texts


def _sentence(draw: random.Random, number: int) -> str:
    # Early words are drawn more often, as in any language.
    words = [options[int(draw.random() ** 2 * len(options))] for options in (_SUBJECTS, _VERBS, _OBJECTS, _ENDS)]
    return f"{words[0].capitalize()} {words[1]} {words[2]}{words[3]}".format(number=number)


def small_corpus(folder: Path, *, vocab_size: int = 300) -> str:
    """Publish a corpus of a few short documents under `folder`; gives its URI."""
    config = CorpusConfig(
        sources=[str(small_texts(folder))], pattern="*.txt", output=str(folder / "corpus"), vocab_size=vocab_size
    )
    build_corpus(config, lambda progress: None)
    return config.output
