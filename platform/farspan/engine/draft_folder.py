"""The draft model that a config names: checked against the model it guesses for, opened, given its part of the memory.

Of `engine.kv_bytes` both have room for equally many tokens, so that whatever the model computes can be guessed on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from farspan.config.schema import EngineConfig
from farspan.config.serve_rules import check_engine
from farspan.engine.draft_model import ModelDrafter
from farspan.engine.path import page_layout, trial_pages
from farspan.engine.probe import refuse_config
from farspan.engine.recurrent import has_states
from farspan.errors import ConfigError, ModelError
from farspan.kv.layout import KvLayout
from farspan.models.checkpoint import load_causal_lm, load_tokenizer, open_config
from farspan.models.folder import open_model_folder

logger = logging.getLogger(__name__)

_FIELD = "engine.draft_model"
_LEAVE_OUT = f"leave {_FIELD} out"


def check_draft(uri: str, model: PretrainedConfig, tokenizer: Any) -> Path:
    """The local folder of a draft model, before any weights are loaded. `model`, `tokenizer`: of whom it guesses for.

    Raises CheckpointError or StorageError where there is no model in it, ConfigError where it cannot guess.
    """
    folder = open_model_folder(uri)
    _refuse_target(model, uri)
    _refuse_draft(open_config(folder), uri)
    _refuse_other_tokens(_tokens(tokenizer), _tokens(load_tokenizer(folder)), uri)
    return folder


def open_drafter(model: PreTrainedModel, config: EngineConfig, tokenizer: Any) -> tuple[ModelDrafter, EngineConfig]:
    """Who guesses for a model, and the config with what is left of the memory for the model itself.

    Without a tokenizer the draft model must have as many tokens, or more. Raises what `check_draft` raises, and
    ConfigError for settings that do not go with it and where engine.kv_bytes is too small for both.
    """
    uri = config.draft_model
    assert uri is not None, "there is a draft model"
    check_engine(config)
    if tokenizer is None:
        folder, num_tokens = open_model_folder(uri), int(model.get_input_embeddings().num_embeddings)
    else:
        folder, num_tokens = check_draft(uri, model.config, tokenizer), 1 + max(_tokens(tokenizer))
    try:
        own = page_layout(model, config)
    except ModelError as problem:
        raise unfit_target(str(problem), uri) from None
    draft = load_causal_lm(folder, model.dtype).to(model.device)
    try:
        bytes_of_draft = share_of_draft(config, own, page_layout(draft, config))
        drafter = ModelDrafter(draft, replace(config, kv_bytes=bytes_of_draft, draft_model=None), num_tokens)
    except ModelError as problem:
        raise _unfit_draft(str(problem), uri) from None
    logger.info("%s guesses, with %d of engine.kv_bytes=%d", uri, bytes_of_draft, config.kv_bytes)
    return drafter, replace(config, kv_bytes=config.kv_bytes - bytes_of_draft)


def share_of_draft(config: EngineConfig, model: KvLayout, draft: KvLayout) -> int:
    """Bytes of engine.kv_bytes for the pages of a draft model. Raises ConfigError where there are too few for both."""
    places = [layout.cost_bytes * layout.num_groups for layout in (model, draft)]
    least = sum(places) * max(trial_pages(layout) // layout.num_groups for layout in (model, draft))
    if config.kv_bytes < least:
        rule = f"must hold pages of the model and of its draft model, {least - config.kv_bytes} bytes are missing"
        way_out = f"use at least engine.kv_bytes={least} or {_LEAVE_OUT}"
        raise ConfigError("engine.kv_bytes", rule, config.kv_bytes, way_out)
    return config.kv_bytes // sum(places) * places[1]


def unfit_target(reason: str, uri: str) -> ConfigError:
    """What to say of a model that nobody guesses for."""
    rule = f"goes with a model that can take wrong guesses back, which this one cannot ({reason})"
    return ConfigError(_FIELD, rule, uri, _LEAVE_OUT)


def _refuse_target(config: PretrainedConfig, uri: str) -> None:
    if has_states(config):
        raise unfit_target(f"{config.model_type} keeps a recurrent state", uri)


def _refuse_draft(config: PretrainedConfig, uri: str) -> None:
    try:
        refuse_config(config)
    except ModelError as problem:
        raise _unfit_draft(str(problem), uri) from None
    if has_states(config):
        raise _unfit_draft(f"{config.model_type} keeps a recurrent state", uri)


def _unfit_draft(reason: str, uri: str) -> ConfigError:
    rule = f"must be a model that can take wrong guesses back and has the tokens it guesses ({reason})"
    return ConfigError(_FIELD, rule, uri, f"use a smaller transformer of the same family or {_LEAVE_OUT}")


def _tokens(tokenizer: Any) -> Mapping[int, str]:
    """Text by token, but for those that were added to a vocabulary: their texts differ within families of models."""
    added = set(tokenizer.get_added_vocab())
    return {number: text for text, number in tokenizer.get_vocab().items() if text not in added}


def _refuse_other_tokens(model: Mapping[int, str], draft: Mapping[int, str], uri: str) -> None:
    for number in sorted(model.keys() | draft.keys()):
        here, there = model.get(number), draft.get(number)
        if here != there:
            rule = f"must have the model's tokens, but token {number} is {_told(there)}, and {_told(here)} in the model"
            raise ConfigError(_FIELD, rule, uri, f"use a smaller model of the same family or {_LEAVE_OUT}")


def _told(text: str | None) -> str:
    return "none" if text is None else repr(text)
