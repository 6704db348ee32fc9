"""An adapter's folder in peft's format, read for serving: its matrices, checked against the layers of the model.

peft itself says, on a model without memory, which layers the folder's settings mean, and how large and how strong the
matrices beside each are; the file must hold exactly these. What would have to change anything else is refused.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from farspan.engine.lowrank import Pair
from farspan.errors import CheckpointError
from farspan.models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from farspan.storage.paths import absolute_uri
from farspan.storage.publish import fetch_folder

_PREFIX = "base_model.model."
# What peft is given to find the layers, and their ranks and scales.
_UNDERSTOOD = (
    *("r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("layers_to_transform", "layers_pattern", "fan_in_fan_out"),
)
# What changes nothing that is computed.
_WITHOUT_EFFECT = (
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "megatron_core", "qalora_group_size", "loftq_config", "eva_config"),
)
# How training began; the others begin from a model they have changed.
_HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter in host memory, in the type the model computes in."""

    pairs: Mapping[str, Pair]
    digest: str
    """Of everything that an answer depends on: names of layers, scales, matrices."""

    @property
    def num_bytes(self) -> int:
        return sum(pair.num_bytes for pair in self.pairs.values())


def read_adapter(model: PreTrainedModel, uri: str) -> AdapterFile:
    """The adapter of a folder, local or on S3.

    Raises:
        NotFoundError, UnreachableError: the folder cannot be read.
        CheckpointError: it holds no adapter, another model's, or one that cannot be served exactly.
    """
    with tempfile.TemporaryDirectory(prefix="farspan-adapter-") as scratch:
        folder = _fetched(uri, scratch)
        settings = _read_settings(uri, folder)
        tensors = _read_tensors(uri, folder)
    wanted = _wanted(uri, model, settings)
    named = {f"{_PREFIX}{name}.lora_{which}.weight" for name in wanted for which in "AB"}
    _refuse_others(uri, tensors.keys() - named, named - tensors.keys(), model.config.model_type)
    layers = dict(model.named_modules())
    pairs = {name: _pair(uri, name, layers[name], tensors, want) for name, want in sorted(wanted.items())}
    return AdapterFile(pairs, _digest(pairs))


def fingerprint_adapter(uri: str) -> str:
    """Of both files of an adapter's folder, local or on S3. Raises StorageError where one cannot be read."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="farspan-adapter-") as scratch:
        folder = _fetched(uri, scratch)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (folder / name).is_file():
                raise CheckpointError(uri, f"has no {name}; give a folder that peft has saved")
            with (folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _fetched(uri: str, scratch: str) -> Path:
    return fetch_folder(absolute_uri(uri), Path(scratch), require_manifest=False, choose=_chosen)


def _chosen(names: list[str], read: Callable[[str], bytes]) -> list[str]:
    """Nothing else of the folder is copied, least of all a pickle."""
    return [name for name in names if name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What must stand beside one layer."""

    down: tuple[int, int]
    up: tuple[int, int]
    scale: float


def _read_settings(uri: str, folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        raise CheckpointError(uri, f"has no readable {ADAPTER_CONFIG}; give a folder that peft has saved") from None
    if not isinstance(settings, dict):
        raise CheckpointError(uri, f"{ADAPTER_CONFIG} does not hold an object; copy the folder again")
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(uri, f"peft_type {settings.get('peft_type')} is not served per request; only LORA is")
    for field, value in settings.items():
        _refuse_setting(uri, field, value)
    return {field: value for field, value in settings.items() if field in _UNDERSTOOD}


def _refuse_setting(uri: str, field: str, value: object) -> None:
    if field in (*_UNDERSTOOD, *_WITHOUT_EFFECT):
        return
    allowed: tuple[object, ...] = (None, False, "none")
    if field == "init_lora_weights":
        allowed = (None, *_HARMLESS_STARTS)
    if value not in allowed and value not in ([], {}):
        raise CheckpointError(
            uri,
            f"{ADAPTER_CONFIG} says {field}={value!r}, which is not served per request; merge the adapter into its "
            "model (peft's merge_and_unload) and serve that, or train without it",
        )


def _read_tensors(uri: str, folder: Path) -> dict[str, Tensor]:
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED)
        if pickled:
            raise CheckpointError(
                uri, f"has only pickled weights ({pickled[0]}), which are never opened; save the adapter as safetensors"
            )
        raise CheckpointError(uri, f"has no {ADAPTER_WEIGHTS}; copy the folder again")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as problem:
        reason = " ".join(str(problem).split())
        raise CheckpointError(uri, f"{ADAPTER_WEIGHTS} is torn ({reason}); copy the folder again") from None


def _wanted(uri: str, model: PreTrainedModel, settings: Mapping[str, Any]) -> dict[str, _Wanted]:
    """What peft would put beside which layers."""
    # peft takes seconds to import, and an engine without adapters does not need it.
    import peft
    from peft.tuners.lora import Linear, LoraLayer

    with torch.device("meta"):
        shell = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager")
        head = shell.get_output_embeddings()
        try:
            peft.inject_adapter_in_model(peft.LoraConfig(init_lora_weights=False, **settings), shell, "it")
        except (ValueError, TypeError) as problem:
            reason = " ".join(str(problem).split())[:300]
            raise CheckpointError(
                uri, f"does not fit {model.config.model_type}: {reason}; give an adapter of this model"
            ) from None
    wanted: dict[str, _Wanted] = {}
    # peft stands beside a layer in one place only, wherever else the model has it.
    elsewhere = {id(m) for n, m in shell.named_modules(remove_duplicate=False) if not n.endswith(".base_layer")}
    for name, layer in shell.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if id(layer.get_base_layer()) in elsewhere:
            raise CheckpointError(uri, f"adapts {name}, which this model also has in another place; train without it")
        if not isinstance(layer, Linear) or layer.get_base_layer() is head:
            raise CheckpointError(
                uri,
                f"adapts {name}, which is the head or not a linear layer; merge the adapter into its model (peft's "
                "merge_and_unload) and serve that, or train without it",
            )
        down, up = layer.lora_A["it"].weight, layer.lora_B["it"].weight
        wanted[name] = _Wanted((down.shape[0], down.shape[1]), (up.shape[0], up.shape[1]), float(layer.scaling["it"]))
    return wanted


def _refuse_others(uri: str, unknown: set[str], missing: set[str], model_type: str) -> None:
    if unknown:
        raise CheckpointError(
            uri,
            f"holds {sorted(unknown)[0]} ({len(unknown)} such), which stands beside no linear layer of this "
            f"{model_type} that {ADAPTER_CONFIG} names; give an adapter of this model",
        )
    if missing:
        raise CheckpointError(
            uri,
            f"{ADAPTER_CONFIG} means {len(missing)} matrices that {ADAPTER_WEIGHTS} lacks, such as "
            f"{sorted(missing)[0]}; copy the folder again, or give an adapter of this model",
        )


def _pair(uri: str, name: str, layer: nn.Module, tensors: Mapping[str, Tensor], want: _Wanted) -> Pair:
    weight = layer.weight
    assert isinstance(weight, Tensor), "peft found a linear layer"
    found: list[Tensor] = []
    for which, shape in (("A", want.down), ("B", want.up)):
        tensor = tensors[f"{_PREFIX}{name}.lora_{which}.weight"]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                uri,
                f"lora_{which} of {name} has shape {tuple(tensor.shape)}, beside this model's layer it must be "
                f"{shape}; give an adapter of this model",
            )
        tensor = tensor.to(weight.dtype)
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(uri, f"lora_{which} of {name} has numbers that are not finite in {weight.dtype}")
        found.append(tensor.pin_memory() if weight.is_cuda else tensor)
    return Pair(found[0], found[1], want.scale)


def _digest(pairs: Mapping[str, Pair]) -> str:
    digest = hashlib.sha256()
    for name, pair in pairs.items():
        digest.update(json.dumps([name, pair.scale, list(pair.down_RI.shape), list(pair.up_OR.shape)]).encode())
        for tensor in (pair.down_RI, pair.up_OR):
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
