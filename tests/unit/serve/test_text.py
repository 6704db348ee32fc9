"""Text, and the bytes of each token, are the tokenizer's own, however the tokens come."""

from __future__ import annotations

import json
from itertools import pairwise

import llguidance.hf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.serve.tiny_folder import TEXT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from farspan.engine.detokenize import AnswerText, Detokenizer, whole_text
from farspan.engine.request import SamplingParams, TokenLogprobs
from farspan.serve.logprobs import chat_logprobs, completion_logprobs
from farspan.serve.text import TokenNames
from farspan.serve.tools import showing_tags


def byte_level() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<tool_call>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


def metaspace() -> PreTrainedTokenizerFast:
    """As Llama's and Gemma's: spaces are letters of their own, unknown bytes tokens of their own."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    bpe.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "</s>"], show_progress=False)
    bpe.train_from_iterator([TEXT], trainer)
    written = json.loads(bpe.to_str())
    vocab = written["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(written)), eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def tokenizers():
    return [byte_level(), metaspace()]


@pytest.mark.parametrize("which", [0, 1])
def test_bytes_of_every_token_are_those_llguidance_reads(tokenizers, which):
    tokenizer = tokenizers[which]
    names, reader = TokenNames(tokenizer), llguidance.hf.from_tokenizer(tokenizer)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    plain = [token for token in range(len(tokenizer)) if token not in special]
    assert len(plain) > 300
    for token in plain:
        # llguidance keeps the byte that no text has for marks of its own.
        if names.bytes_of(token) == b"\xff":
            continue
        assert names.bytes_of(token) == bytes(reader.decode_bytes([token])), tokenizer.convert_ids_to_tokens(token)
    assert names.name_of(tokenizer.eos_token_id) == tokenizer.eos_token
    assert names.name_of(10**6) == "token_id:1000000"


def test_part_of_a_character_has_a_name_and_its_bytes(tokenizers):
    tokenizer = tokenizers[0]
    first, *rest = tokenizer("\U0001f600")["input_ids"]
    names = TokenNames(tokenizer)
    assert names.name_of(first) == "bytes:" + "".join(f"\\x{byte:02x}" for byte in names.bytes_of(first))
    assert b"".join(names.bytes_of(token) for token in [first, *rest]).decode() == "\U0001f600"


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_text_does_not_depend_on_how_tokens_are_bundled_and_ends_before_the_first_stop(tokenizers, data):
    tokenizer = tokenizers[0]
    tokens = data.draw(st.lists(st.integers(2, len(tokenizer) - 1), min_size=1, max_size=25))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=4)))
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    at = data.draw(st.integers(0, max(0, len(whole) - 1)))
    stop = whole[at : at + data.draw(st.integers(1, 3))] or "never"
    for stops in ([], [stop]):
        told = [bundle_by(tokenizer, tokens, cuts, stops), bundle_by(tokenizer, tokens, range(len(tokens)), stops)]
        assert told[0] == told[1]
        assert told[0][:2] == whole_text(tokenizer, tokens, "length", SamplingParams(stop=tuple(stops)))
        text, finish, num_tokens = told[0]
        if not stops or "\ufffd" in whole:
            assert stops or (text, finish, num_tokens) == (whole, "length", len(tokens))
        else:
            assert (text, finish) == (whole[: whole.index(stop)], "stop")
            # Shown, it is all that is more: not a letter after it, and the same tokens.
            shown = bundle_by(tokenizer, tokens, cuts, stops, shows_stop=True)
            assert shown == (text + stop, finish, num_tokens)
            asked = SamplingParams(stop=(stop,), include_stop_str_in_output=True)
            assert whole_text(tokenizer, tokens, "length", asked) == shown[:2]


def bundle_by(tokenizer, tokens, cuts, stops, *, shows_stop=False) -> tuple[str, str | None, int]:
    answer = AnswerText(Detokenizer(tokenizer), stops, shows_stop=shows_stop, by_token=False)
    text, count = "", 0
    places = [0, *cuts, len(tokens)]
    for start, end in pairwise(places):
        words = answer.push(tokens[start:end], "length" if end == len(tokens) else None)
        text, count = text + words.text, count + words.num_tokens
        if words.finish is not None:
            return text, words.finish, count
    raise AssertionError("it never ended")


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_tokens_told_together_become_the_text_of_tokens_told_one_by_one_and_no_later(tokenizers, data):
    tokenizer = tokenizers[data.draw(st.integers(0, 1))]
    written = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("ab \u00e9\u4f60\U0001f600\ufffd")))
    # Also what no text becomes: a character that breaks off, behind another, before a word.
    pieces = st.one_of(written.map(lambda text: tokenizer(text)["input_ids"]), chosen(tokenizer))
    tokens = [token for piece in data.draw(st.lists(pieces, max_size=4)) for token in piece]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=6)))
    together, one_by_one = (AnswerText(Detokenizer(tokenizer), by_token=by_token) for by_token in (False, True))
    for start, end in pairwise([0, *cuts, len(tokens)]):
        finish = "length" if end == len(tokens) else None
        told, wanted = (answer.push(tokens[start:end], finish) for answer in (together, one_by_one))
        assert (told.text, told.finish, told.num_tokens) == (wanted.text, wanted.finish, wanted.num_tokens)
        assert len(wanted.offsets) == end - start
        assert not told.offsets
        if finish is not None:
            return


def chosen(tokenizer) -> st.SearchStrategy[list[int]]:
    """Tokens of any kind, every other of them a byte."""
    bytes_ = [
        token for token, name in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))) if len(name) == 1
    ]
    fallen = [token for name, token in tokenizer.get_vocab().items() if name.startswith("<0x")]
    return st.lists(st.one_of(st.integers(0, len(tokenizer) - 1), st.sampled_from(fallen or bytes_)), max_size=12)


@pytest.mark.parametrize("cuts", [(), range(20), (9, 10), (12,), (7,)])
def test_a_character_that_breaks_off_takes_no_word_with_it(tokenizers, cuts):
    tokenizer = tokenizers[1]
    whole, broken = (tokenizer(text)["input_ids"] for text in ("\U0001fae0", "\U0001fae0"))
    before, after = (tokenizer(text)["input_ids"] for text in ("return ", " return"))
    tokens = [*before, *whole, *broken[:-1], *after, *broken[:2]]
    text, finish, count = bundle_by(tokenizer, tokens, [cut for cut in cuts if cut <= len(tokens)], [])
    assert (text, finish, count) == ("return \U0001fae0\ufffd\ufffd\ufffd return\ufffd\ufffd", "length", len(tokens))
    assert whole_text(tokenizer, tokens, "length", SamplingParams()) == (text, finish)


def test_tags_of_calls_are_shown_where_they_are_special_tokens_and_ends_are_not(tokenizers):
    tokenizer = tokenizers[0]
    tokens = tokenizer("a <tool_call>{}<|end|>")["input_ids"]
    assert Detokenizer(tokenizer).push(tokens) == "a {}"
    assert Detokenizer(showing_tags(tokenizer)).push(tokens) == "a <tool_call>{}"
    assert showing_tags(tokenizers[1]) is tokenizers[1]


def test_what_can_never_be_chosen_has_a_number_that_json_knows(tokenizers):
    names = TokenNames(tokenizers[0])
    found = [TokenLogprobs(5, float("-inf"), ((6, -0.5), (5, float("-inf"))))]
    assert chat_logprobs(found, names, 2)["content"][0]["logprob"] == -9999.0
    told = completion_logprobs([7, *found], [0, 1], names, 1)
    assert told["token_logprobs"] == [None, -9999.0]
    assert told["top_logprobs"] == [None, {names.name_of(5): -9999.0, names.name_of(6): -0.5}]
