"""Hugging Face model folders: check, open, make, save. safetensors only; remote code is never run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from farspan.config.load import nearest
from farspan.errors import CheckpointError, ConfigError, ModelError
from farspan.models.rope import stretch_ntk, take_ntk

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_model_folder(folder: Path, *, tokenizer: bool = False) -> None:
    """Refuse a folder that is not a complete Hugging Face model, before anything expensive starts.

    Raises:
        CheckpointError: what is missing or torn, and the way out.
    """
    if not folder.is_dir():
        raise CheckpointError(str(folder), "no such model folder; give a folder with config.json and model.safetensors")
    _read_json(folder, "config.json")
    for name in weight_files(folder):
        _check_weight_file(folder / name)
    if tokenizer and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(str(folder), "has no tokenizer (tokenizer.json); save the tokenizer beside the weights")


def open_config(folder: Path) -> PretrainedConfig:
    """The model's transformers config; its rope_type may also be farspan's `ntk` (rope.py).

    Raises:
        CheckpointError: there is no config.json.
        ModelError, ConfigError: transformers cannot read it, or not with that `ntk`.
    """
    fields, factors = take_ntk(_read_json(folder, "config.json"), f"{folder / 'config.json'}: ")
    try:
        if not factors:
            return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    except (ValueError, KeyError) as problem:
        raise ModelError(f"{folder}: transformers cannot read config.json: {_one_line(problem)}") from None
    stretch_ntk(config, factors)
    return config


def load_causal_lm(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder on the CPU in `dtype`, in eval mode.

    Raises:
        CheckpointError: an incomplete folder, or weights that do not fit the config.
        ModelError: transformers has no decoder for this config.
    """
    check_model_folder(folder)
    config = open_config(folder)
    _require_causal_lm(config)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    # transformers would fill a missing weight with random numbers and warn; that is silent wrong training.
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise CheckpointError(str(folder), f"weights do not fit config.json: missing or misshapen {missing[:3]}")
    return model.eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(str(folder), "has no tokenizer (tokenizer.json); save the tokenizer beside the weights")
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def make_config(
    architecture: str, settings: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> PretrainedConfig:
    """A transformers config from its model_type and fields; an unknown field is refused.

    `defaults` are taken where `settings` is silent and the architecture has such a field. A rope_type may be
    `ntk` (rope.py).

    Raises:
        ConfigError: unknown architecture or field, or values transformers rejects.
        ModelError: `ntk` for a model without such a rope.
    """
    if architecture not in CONFIG_MAPPING:
        raise ConfigError(
            "model.architecture",
            "must be a model_type of transformers",
            architecture,
            nearest(architecture, list(CONFIG_MAPPING.keys())),
        )
    config_class = CONFIG_MAPPING[architecture]
    known = set(config_class().to_dict())
    for name, value in settings.items():
        if name not in known:
            raise ConfigError(
                f"model.settings.{name}",
                f"is not a field of {config_class.__name__}",
                value,
                nearest(name, list(known)),
            )
    fitting = {name: value for name, value in (defaults or {}).items() if name in known}
    plain, factors = take_ntk(settings, "model.settings.")
    try:
        config = config_class(**{**fitting, **plain})
        _require_causal_lm(config)
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, KeyError, ArithmeticError, RuntimeError, StrictDataclassError) as problem:
        # transformers checks little of a config before it builds the model; the meta device builds it for nothing.
        reason = f"transformers cannot build it ({type(problem).__name__}: {_one_line(problem)})"
        raise ConfigError("model.settings", reason, dict(settings), "change that field") from None
    stretch_ntk(config, factors)
    return config


def random_causal_lm(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A model with random fp32 weights, a function of (config, seed) alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def save_causal_lm(
    out: Path, config: PretrainedConfig, state: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Write an ordinary Hugging Face folder that `from_pretrained` opens.

    `state` holds whole tensors under the model's own names; its dtype becomes the folder's dtype.
    """
    dtype = next(iter(state.values())).dtype
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config, dtype=dtype)
    # Gathered tensors no longer share memory, so a tied weight would be written twice.
    tied = shell.all_tied_weights_keys if config.tie_word_embeddings else {}
    shell.save_pretrained(out, state_dict={name: t for name, t in state.items() if name not in tied})
    if tokenizer is not None:
        tokenizer.save_pretrained(out)


def _require_causal_lm(config: PretrainedConfig) -> None:
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"model_type {config.model_type!r} has no causal language model in transformers")


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that are opened. Raises CheckpointError."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if (folder / WEIGHTS_INDEX).is_file():
        names = sorted(set(_read_json(folder, WEIGHTS_INDEX).get("weight_map", {}).values()))
        if any(Path(name).name != name for name in names):
            raise CheckpointError(str(folder), f"{WEIGHTS_INDEX} names files outside the folder")
        if names:
            return names
    other = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if other:
        raise CheckpointError(
            str(folder), f"has only pickled weights ({other[0]}), which are never opened; convert them to safetensors"
        )
    raise CheckpointError(str(folder), f"has no weights; expected {WEIGHTS} or {WEIGHTS_INDEX}")


def _check_weight_file(file: Path) -> None:
    if not file.is_file():
        raise CheckpointError(str(file.parent), f"weight file {file.name} is missing; copy the folder again")
    try:
        with safe_open(file, framework="pt") as opened:
            opened.keys()
    except (SafetensorError, OSError) as problem:
        raise CheckpointError(
            str(file.parent), f"weight file {file.name} is torn ({_one_line(problem)}); copy the folder again"
        ) from None


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(str(folder), f"has no {name}; give a Hugging Face model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise CheckpointError(
            str(folder), f"{name} is not JSON ({_one_line(problem)}); copy the folder again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(str(folder), f"{name} does not hold an object; copy the folder again")
    return content


def _one_line(problem: BaseException) -> str:
    return " ".join(str(problem).split())
