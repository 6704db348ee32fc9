"""Is farspan's forward the model's own forward? Measured on a small copy, before a run, in a second or two.

Shapes: T tokens, L tokens of one document, V vocabulary, E width.

The copy runs packed, by farspan, and document by document, by transformers with its own attention and masks; the
logits must be equal. What no rule foresaw (a mask in an unusual place, a tail after the head) shows here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from farspan.errors import ModelError
from farspan.models.attention import packed_hidden, use_farspan_attention
from farspan.models.parts import decoder_layers, trunk_and_head
from farspan.models.rules import layer_rules, refuse_unsupported
from farspan.parallel.documents import attend_documents
from farspan.parallel.whole import WholeSequence
from farspan.verify.shrink import small_model

_DOCUMENTS = (17, 9, 2, 12)
# transformers' eager attention takes its softmax in fp32 whatever the model's type; a real fault is 1e-3 and more.
_ALLOWED = 1e-5
_PROBLEMS = (TypeError, ValueError, AttributeError, RuntimeError, KeyError, IndexError, NotImplementedError)


@torch.no_grad()
def check_model(config: PretrainedConfig) -> None:
    """Hold the packed forward of a small copy of `config`'s model against transformers' own, document by document.

    Raises:
        ModelError: they differ, or the model cannot be run packed; names the first layer that differs.
    """
    refuse_unsupported(config)
    model = small_model(config)
    generator = torch.Generator().manual_seed(1)
    bounds = tuple(accumulate(_DOCUMENTS, initial=0))
    tokens_T = torch.randint(0, model.config.get_text_config().vocab_size, (bounds[-1],), generator=generator)
    own_TV, own_layers = _watched(model, lambda: plain_logits(model, tokens_T, bounds))
    use_farspan_attention(model)
    try:
        got_TV, got_layers = _watched(model, lambda: packed_logits(model, tokens_T, bounds))
    except _PROBLEMS as problem:
        reason = " ".join(str(problem).split())[:300]
        raise ModelError(f"{type(model).__name__} cannot run on packed documents: {reason}") from None
    if not _equal(got_TV, own_TV):
        raise ModelError(
            f"{type(model).__name__} would not be trained exactly: {_where(model, got_layers, own_layers)}"
        )


def plain_logits(model: PreTrainedModel, tokens_T: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """logits_TV by transformers alone: every document by itself, torch's attention where the model allows it."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    parts = [model(input_ids=tokens_T[a:b].unsqueeze(0), use_cache=False).logits[0] for a, b in pairwise(bounds)]
    return torch.cat(parts)


def packed_logits(model: PreTrainedModel, tokens_T: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """logits_TV of all documents in one packed forward, on this process."""
    attention = _Counting(partial(attend_documents, bounds=bounds))
    positions_T = torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)])
    hidden_TE = packed_hidden(model, tokens_T, positions_T, attention, WholeSequence(bounds))
    expected = sum(not rule.recurrent for rule in layer_rules(model.config))
    if attention.calls < expected:
        raise ModelError(
            f"{type(model).__name__} computed attention {attention.calls} times through transformers' registry, its "
            f"config has {expected} attention layers"
        )
    return trunk_and_head(model)[1](hidden_TE)


class _Counting:
    """An attention that counts how often it was asked."""

    def __init__(self, attention: Callable[..., Tensor]) -> None:
        self._attention, self.calls = attention, 0

    def __call__(self, q_tHD: Tensor, k_tGD: Tensor, v_tGC: Tensor, **rule: Any) -> Tensor:
        self.calls += 1
        return self._attention(q_tHD, k_tGD, v_tGC, **rule)


def _watched(model: PreTrainedModel, run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """(what `run` gives, what each decoder layer gave meanwhile, calls laid end to end)."""
    seen: list[list[Tensor]] = [[] for _ in decoder_layers(model)]

    def keep(into: list[Tensor]) -> Callable[..., None]:
        def hook(_module: object, _args: object, output: object) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor):
                into.append(hidden.flatten(0, -2))

        return hook

    handles = [layer.register_forward_hook(keep(into)) for layer, into in zip(decoder_layers(model), seen, strict=True)]
    try:
        return run(), [torch.cat(parts) for parts in seen if parts]
    finally:
        for handle in handles:
            handle.remove()


def _where(model: PreTrainedModel, got: list[Tensor], own: list[Tensor]) -> str:
    for number, (a, b, rule) in enumerate(zip(got, own, layer_rules(model.config), strict=False)):
        if not _equal(a, b):
            return f"layer {number} ({rule}) differs from transformers' own by {_error(a, b):.1e}"
    return "its layers are equal, but it changes its logits after the linear head in a way farspan does not know"


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and _error(a, b) <= _ALLOWED


def _error(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value wanted; NaN counts as infinitely wrong."""
    error = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
    return error if error == error else float("inf")
