"""Look at a model before serving it: what its KV looks like, and whether paged attention computes what it computes."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from farspan.engine.attention import ATTENTION_NAME, KEYWORD, register_attention
from farspan.errors import ModelError
from farspan.kernels.attention.dispatch import choose_backend
from farspan.kernels.attention.limits import Ask
from farspan.kv.layout import KvLayout

_PROBE_TOKENS = 4
_SAMPLED_ELEMENTS = 4096


def refuse_config(config: PretrainedConfig) -> None:
    """Raises ModelError for what a config says openly and paged attention does not compute yet."""
    text = config.get_text_config(decoder=True)
    name = text.model_type
    layers = getattr(text, "layer_types", None) or ["full_attention"]
    if other := [kind for kind in layers if kind != "full_attention"]:
        raise ModelError(f"{name} has {other[0]} layers; the engine serves models of full attention only")
    if getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True):
        raise ModelError(f"{name} has a sliding window of {text.sliding_window}; the engine has none yet")
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise ModelError(f"{name} caps attention logits; the engine does not yet")
    kind = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    # Their frequencies depend on the longest position of a batch: one request would change another.
    if kind in ("dynamic", "longrope"):
        raise ModelError(f"{name} has rope_type {kind}, which mixes the requests of a packed batch")


def discover_layout(model: PreTrainedModel, page_tokens: int) -> KvLayout:
    """The KV layout of a model, seen in one tiny forward. Switches the model to paged attention.

    Raises ModelError when the model does not compute attention through transformers' registry.
    """
    register_attention()
    try:
        model.set_attn_implementation(ATTENTION_NAME)
    except (ValueError, ImportError) as problem:
        raise ModelError(f"{model.config.model_type} cannot change its attention: {problem}") from None
    probe = _ShapeProbe()
    forward(model, torch.zeros(_PROBE_TOKENS, dtype=torch.long), torch.arange(_PROBE_TOKENS), probe, None)
    if sorted(probe.shapes) != list(range(len(probe.shapes))) or not probe.shapes:
        raise ModelError(f"{model.config.model_type} does not compute every layer through transformers' registry")
    if len(set(probe.shapes.values())) != 1:
        raise ModelError(f"{model.config.model_type} has layers of different KV shapes: {set(probe.shapes.values())}")
    num_kv_heads, k_head_dim, v_head_dim = probe.shapes[0]
    return KvLayout(
        model=fingerprint_model(model),
        num_layers=len(probe.shapes),
        num_kv_heads=num_kv_heads,
        k_head_dim=k_head_dim,
        v_head_dim=v_head_dim,
        dtype=str(model.dtype).removeprefix("torch."),
        page_tokens=page_tokens,
    )


def forward(model: PreTrainedModel, tokens_T: Tensor, positions_T: Tensor, attend: Any, keep: Tensor | None) -> Tensor:
    """Logits [len(keep), V] of a packed forward (all T of them for None)."""
    device = model.device
    with torch.inference_mode():
        out = model(
            input_ids=tokens_T.unsqueeze(0).to(device),
            position_ids=positions_T.unsqueeze(0).to(device),
            use_cache=False,
            logits_to_keep=0 if keep is None else keep.to(device),
            **{KEYWORD: attend},
        )
    logits: Tensor = out.logits[0]
    return logits


def plain_logits(model: PreTrainedModel, tokens_T: Tensor) -> Tensor:
    """Logits [T, V] of the model as transformers computes it."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        with torch.inference_mode():
            logits: Tensor = model(input_ids=tokens_T.unsqueeze(0).to(model.device), use_cache=False).logits[0]
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
    return logits


def fingerprint_model(model: PreTrainedModel) -> str:
    """Differs between two models whose weights differ: names, shapes and a sample of every parameter."""
    digest = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLED_ELEMENTS)].contiguous().cpu()
        content = xxhash.xxh3_64_hexdigest(sample.view(torch.uint8).numpy().data)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {content}".encode())
    return digest.hexdigest()


class _ShapeProbe:
    """Attention of one sequence that remembers what it was given."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int, int]] = {}

    def __call__(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGC: Tensor, scale: float) -> Tensor:
        if layer in self.shapes:
            raise ModelError(f"layer {layer} computes attention more than once")
        self.shapes[layer] = (k_TGD.shape[1], k_TGD.shape[2], v_TGC.shape[2])
        return choose_backend(Ask.of(q_THD, v_TGC)).forward(q_THD, k_TGD, v_TGC, scale=scale, offset=0)[0]
