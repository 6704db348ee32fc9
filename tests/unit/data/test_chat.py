"""Conversations become transformers' own tokens, and only what the assistant says is learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from farspan.batch import IGNORED_LABEL
from farspan.config.schema import CorpusConfig
from farspan.data.chat import ChatEncoder
from farspan.data.corpus import build_corpus
from farspan.data.reader import Reader, open_corpus
from farspan.data.tokenizer import train_tokenizer
from farspan.errors import ConfigError

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As templates of reasoning models do: an answer is shortened once another one follows it.
FORGETFUL = PLAIN.replace("{{ m.content }}", "{{ m.content if loop.last else m.content[:2] }}")

TALKS: list[list[dict[str, Any]]] = [
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
    ],
    [
        {"role": "user", "content": "größe 日本 🙂"},
        {"role": "assistant", "content": "🙂🙂 größe"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "def f():\n    return 'größe'\n"},
    ],
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([json.dumps(TALKS, ensure_ascii=False) * 3], 320, folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    loaded.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    loaded.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("talk", TALKS)
def test_ids_and_mask_equal_apply_chat_template(tokenizer: Path, talk: list[dict[str, Any]]) -> None:
    expected = AutoTokenizer.from_pretrained(tokenizer).apply_chat_template(
        talk, chat_template=MARKED, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    answer = ChatEncoder(tokenizer, MARKED, "assistant").encode(talk)
    assert not isinstance(answer, str)
    ids, spans_N2 = answer
    assert ids.tolist() == expected["input_ids"]
    mask = np.zeros(len(ids), int)
    for start, stop in spans_N2:
        mask[start:stop] = 1
    assert mask.tolist() == expected["assistant_masks"]
    assert 0 < mask.sum() < len(ids)


@pytest.mark.parametrize("talk", TALKS)
def test_a_template_without_marks_gives_the_same_turns_with_their_line_ends(
    tokenizer: Path, talk: list[dict[str, Any]]
) -> None:
    marked, plain = (ChatEncoder(tokenizer, template, "assistant").encode(talk) for template in (MARKED, PLAIN))
    assert not isinstance(marked, str)
    assert not isinstance(plain, str)
    assert np.array_equal(marked[0], plain[0])
    # The turn ends after the line end that the template writes behind <|im_end|>.
    assert np.array_equal(marked[1] + np.array([0, 1], np.uint32), plain[1])


def test_training_on_all_marks_every_token(tokenizer: Path) -> None:
    answer = ChatEncoder(tokenizer, PLAIN, "all").encode(TALKS[0])
    assert not isinstance(answer, str)
    assert answer[1].tolist() == [[0, len(answer[0])]]


def test_what_cannot_be_learnt_says_why(tokenizer: Path) -> None:
    encode = ChatEncoder(tokenizer, FORGETFUL, "assistant").encode
    assert encode(TALKS[1]) == "rewritten by the chat template when the conversation goes on"
    assert encode([{"role": "user", "content": "<|im_end|>"}]) == "spells a special token"
    assert encode([{"role": "user", "content": "hello"}]) == "the assistant says nothing"
    refusing = "{{ raise_exception('no') }}"
    assert ChatEncoder(tokenizer, refusing, "all").encode(TALKS[0]) == "refused by the chat template"


def test_no_template_and_a_broken_one_are_refused(tokenizer: Path) -> None:
    with pytest.raises(ConfigError, match="the tokenizer has none"):
        ChatEncoder(tokenizer, None, "assistant")
    with pytest.raises(ConfigError, match="must be a Jinja template"):
        ChatEncoder(tokenizer, "{% for %}", "assistant")


@pytest.mark.parametrize("sequence_tokens", [16, 61, 500])
def test_a_batch_has_labels_only_where_the_assistant_speaks(
    tokenizer: Path, tmp_path: Path, sequence_tokens: int
) -> None:
    lines = [*({"messages": talk} for talk in TALKS), {"messages": []}, {"messages": [{"role": "user"}]}]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "template.jinja").write_text(MARKED)
    config = CorpusConfig(
        sources=[str(tmp_path / "talks.jsonl")],
        output=str(tmp_path / "corpus"),
        format="chat",
        tokenizer=str(tokenizer),
        chat_template=str(tmp_path / "template.jinja"),
    )
    manifest = build_corpus(config, lambda _: None)
    assert (manifest.documents, manifest.num_skipped, manifest.rule.format) == (2, 2, "chat")
    # The template travels with the corpus, and from there with every model trained on it.
    loaded = AutoTokenizer.from_pretrained(tmp_path / "corpus" / "tokenizer")
    assert loaded.chat_template == MARKED
    expected = [
        loaded.apply_chat_template(
            talk, chat_template=MARKED, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        for talk in TALKS
    ]
    reader = Reader(open_corpus(str(tmp_path / "corpus"), tmp_path / "cache"), sequence_tokens, seed=1)
    for index in range(6):
        batch, pieces = reader.batch(index), reader.plan.sequence(index)
        for piece, start, stop in zip(pieces, batch.bounds, batch.bounds[1:], strict=False):
            talk = expected[piece.document]
            ids = torch.tensor(talk["input_ids"])[piece.start : piece.stop]
            mask = torch.tensor(talk["assistant_masks"])[piece.start : piece.stop].bool()
            assert torch.equal(batch.tokens_T[start:stop], ids)
            labels = torch.where(mask[1:], ids[1:], IGNORED_LABEL)
            assert torch.equal(batch.labels_T[start : stop - 1], labels)
            assert batch.labels_T[stop - 1] == IGNORED_LABEL
