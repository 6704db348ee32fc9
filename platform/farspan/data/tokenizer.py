"""The tokenizer of a corpus: an ordinary Hugging Face folder, given or trained here.

Trained here: byte-level BPE over all 256 bytes, so that every UTF-8 text has a spelling and comes back exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from farspan.errors import ConfigError, NotFoundError
from farspan.storage.door import open_store

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_SPECIALS_FILE = "special_tokens_map.json"
_TEMPLATE_FILE = "chat_template.jinja"
_FILES = (
    TOKENIZER_FILE,
    _CONFIG_FILE,
    _SPECIALS_FILE,
    "added_tokens.json",
    _TEMPLATE_FILE,
    "merges.txt",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
_LONGEST_CONTEXT = 1_000_000_000


@dataclass(frozen=True)
class Encoder:
    """A tokenizer ready to encode documents: text to token ids, without special tokens added."""

    tokenizer: Tokenizer
    eos_token_id: int
    vocab_size: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, in parallel threads of the tokenizers library."""
        return [answer.ids for answer in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE on `texts` and write it to `folder`. The same texts give the same bytes.

    The vocabulary has at most `vocab_size` entries; fewer when the texts do not hold that many pairs to merge.
    """
    tokenizer = Tokenizer(models.BPE())
    # A prefix space would come back as a space that was never there.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    # Written by Python: the library reports a full disk as a bare Exception.
    (folder / TOKENIZER_FILE).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    _write_json(folder / _CONFIG_FILE, _config())
    _write_json(folder / _SPECIALS_FILE, dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT))


def open_encoder(folder: Path, uri: str) -> Encoder:
    """The tokenizer of a Hugging Face folder, with the token that ends a document.

    Raises:
        NotFoundError: the folder has no tokenizer.json.
        ConfigError: it cannot be read, or names no eos token that is in its vocabulary.
    """
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise NotFoundError(uri, f"holds no {TOKENIZER_FILE}; save the tokenizer with a fast (Rust) backend")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as problem:  # The Rust library raises a bare Exception.
        raise ConfigError(
            "tokenizer", f"must hold a readable {TOKENIZER_FILE}", uri, f"save it again ({problem})"
        ) from None
    # Both are settings for batches of a model; a corpus needs every token of a document and nothing else.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A text that spells <|endoftext|> is a text: only the end of a document becomes the eos token.
    tokenizer.encode_special_tokens = True
    eos = _eos_token(folder)
    token_id = tokenizer.token_to_id(eos) if eos is not None else None
    if token_id is None:
        raise ConfigError(
            "tokenizer", "must name an eos_token that is in its vocabulary", eos, f"set eos_token in {_CONFIG_FILE}"
        )
    # Added tokens may lie above the model's vocabulary with a gap between.
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return Encoder(tokenizer, int(token_id), vocab_size)


def copy_tokenizer(uri: str, folder: Path) -> None:
    """Copy the tokenizer files of a Hugging Face folder (which may be a whole model) into `folder`.

    Raises:
        NotFoundError: no tokenizer.json there.
    """
    store = open_store(uri)
    present = [name for name in _FILES if store.exists(name)]
    if TOKENIZER_FILE not in present:
        raise NotFoundError(uri, f"holds no {TOKENIZER_FILE}; name a folder saved by a fast (Rust) tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    for name in present:
        store.download(name, folder / name)


def set_template(uri: str, folder: Path) -> None:
    """Make the Jinja file at `uri` the chat template of the tokenizer in `folder`, for all who load it.

    Raises:
        NotFoundError: no such file.
        ConfigError: it is not text.
    """
    parent, _, name = uri.rpartition("/")
    try:
        text = open_store(parent or ".").read_bytes(name).decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError("chat_template", "must be a text file", uri, "name a Jinja file") from None
    (folder / _TEMPLATE_FILE).write_text(text, encoding="utf-8")


def _eos_token(folder: Path) -> str | None:
    for name in (_CONFIG_FILE, _SPECIALS_FILE):
        file = folder / name
        if not file.is_file():
            continue
        try:
            value = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError):
            continue
        # Older folders spell a token as a dictionary of its properties.
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            return value
    return None


def _config() -> dict[str, object]:
    return {
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "model_max_length": _LONGEST_CONTEXT,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
