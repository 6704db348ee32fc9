"""Streamed text is the tokenizer's text, and ends where it should."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from farspan.engine.detokenize import Detokenizer, StopStrings

TEXT = "naïve café — 日本語のテキスト 👩‍👩‍👧 and plain words, def f(x):\n    return x\n" * 3


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level with almost no merges: most characters are several tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


def stream(tokenizer, tokens: list[int], chance: random.Random) -> list[str]:
    detokenizer, deltas, at = Detokenizer(tokenizer), [], 0
    while at < len(tokens):
        count = chance.randint(1, 4)
        deltas.append(detokenizer.push(tokens[at : at + count]))
        at += count
    return [*deltas, detokenizer.finish()]


def test_deltas_of_real_text_concatenate_to_it_and_never_show_half_a_character(tokenizer):
    chance = random.Random(0)
    tokens = tokenizer(TEXT)["input_ids"]
    for _ in range(20):
        deltas = stream(tokenizer, tokens, chance)
        assert "".join(deltas) == tokenizer.decode(tokens, skip_special_tokens=True) == TEXT
        assert not any("\ufffd" in delta for delta in deltas)
        assert sum(bool(delta) for delta in deltas) > 20


def test_deltas_of_any_tokens_concatenate_to_the_tokenizers_text(tokenizer):
    chance = random.Random(1)
    for _ in range(300):
        # Random tokens are broken UTF-8 for the most part, with special tokens in between.
        tokens = [chance.randrange(len(tokenizer)) for _ in range(chance.randint(1, 40))]
        assert "".join(stream(tokenizer, tokens, chance)) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_stop_string_is_found_however_it_is_cut_and_nothing_of_it_is_shown():
    text, stops = "one two three STOP four", ["STOP", "never"]
    chance = random.Random(2)
    for _ in range(200):
        finder, shown, at = StopStrings(stops), "", 0
        while at < len(text):
            step = chance.randint(1, 5)
            shown += finder.push(text[at : at + step])
            at += step
        assert finder.stopped
        assert shown + finder.finish() == "one two three "


def test_text_that_only_looks_like_a_stop_string_is_all_shown():
    finder = StopStrings(["STOP"])
    shown = "".join(finder.push(letter) for letter in "ST STO STOO S")
    assert not finder.stopped
    assert shown + finder.finish() == "ST STO STOO S"


def test_the_stop_string_that_comes_first_ends_the_text():
    finder = StopStrings(["bb", "a"])
    assert finder.push("xxabb") == "xx"
    assert finder.stopped
    assert finder.push("more") == ""


def test_where_an_answer_stops_does_not_depend_on_how_its_text_is_cut():
    chance = random.Random(3)
    for _ in range(500):
        text = "".join(chance.choice("ab") for _ in range(40))
        stops = ["".join(chance.choice("ab") for _ in range(chance.randint(2, 7))) for _ in range(3)]
        ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
        finder, shown, at = StopStrings(stops), "", 0
        while at < len(text):
            step = chance.randint(1, 6)
            shown += finder.push(text[at : at + step])
            at += step
        assert shown + finder.finish() == (text[: min(ends)[1]] if ends else text)
        assert finder.stopped == bool(ends)


def test_a_long_stop_string_that_almost_comes_costs_no_more_than_the_text_is_long():
    class Letters(str):
        __slots__ = ()
        compared = 0

        def __getitem__(self, key):
            Letters.compared += 1
            return str.__getitem__(self, key)

    size = 20_000
    finder = StopStrings([Letters("a" * size + "b")])
    Letters.compared = 0
    shown = "".join(finder.push("a") for _ in range(2 * size))
    assert shown + finder.finish() == "a" * 2 * size
    assert 0 < Letters.compared < 10 * 2 * size
