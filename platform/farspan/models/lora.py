"""LoRA by peft: small trained matrices beside frozen linear layers, saved in peft's format and merged for serving.

The layers are injected into the transformers model, whose class and names stay: everything that finds its way through
the model still does. Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from farspan.config.schema import LoraConfig
from farspan.errors import CheckpointError, ConfigError

# peft takes seconds to import, and a run without LoRA does not need it.
if TYPE_CHECKING:
    import peft
    from peft.tuners.lora import LoraLayer

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_BASE_DIGEST = "adapter_base.json"
_NAME = "default"
_PREFIX = "base_model.model."
_RANDOM = "random weights of "
# What must be the same for saved matrices to mean the same.
_SETTINGS = ("r", "lora_alpha", "target_modules")


@dataclass(frozen=True)
class Adapter:
    """What a model was given to train, and the frozen model it belongs to."""

    config: peft.LoraConfig
    base: str
    """Folder of the frozen model, or how its random weights were made."""
    base_digest: str
    """xxh3 of the frozen model's weights in fp32: the same folder may hold another model later."""


def base_of(source: str | None, architecture: str, seed: int) -> str:
    """How an adapter names the model it stands beside."""
    return source if source is not None else f"{_RANDOM}{architecture}, seed {seed}"


def add_adapter(model: PreTrainedModel, lora: LoraConfig, base: str, seed: int, frozen: torch.dtype) -> Adapter:
    """Freeze `model` in the type `frozen` and put matrices A and B beside its layers, in the model's own type.

    A is random, a function of `seed`; B is zero, so the model starts as it was.

    Raises:
        ConfigError: no layer has such a name, or one of them is not a linear layer or is the head.
    """
    wide = next(model.parameters()).dtype
    digest = _digest(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = _inject(model, lora, base)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(wide if parameter.requires_grad else frozen)
    return Adapter(config, base, digest)


def count_matrices(model: PretrainedConfig, lora: LoraConfig) -> int:
    """Numbers in the matrices A and B of a model, counted on the meta device.

    Raises:
        ConfigError: `lora.targets` does not fit the model.
    """
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(model)
        _inject(shell, lora, "")
    return sum(p.numel() for p in shell.parameters() if p.requires_grad)


def save_adapter(out: Path, adapter: Adapter, weights: Mapping[str, Tensor]) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` opens. `weights` are whole, by the model's own names."""
    out.mkdir(parents=True, exist_ok=True)
    named = {_PREFIX + name.replace(f".{_NAME}.", "."): t.contiguous() for name, t in weights.items()}
    save_file(named, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy.copy(adapter.config)
    config.inference_mode = True
    config.save_pretrained(str(out))
    (out / _BASE_DIGEST).write_text(json.dumps({"xxh3_128": adapter.base_digest}), encoding="utf-8")


def load_adapter(folder: Path, adapter: Adapter) -> dict[str, Tensor]:
    """The matrices of a folder, by the names of a model that `adapter` was added to.

    Raises:
        CheckpointError: they were trained with other settings, or beside another model.
    """
    saved = _read(folder, ADAPTER_CONFIG)
    for field in _SETTINGS:
        was, is_now = _plain(saved.get(field)), _plain(getattr(adapter.config, field))
        if was != is_now:
            raise CheckpointError(
                str(folder), f"the adapter was trained with {field}={was}, this run has {is_now}; restore it in `lora`"
            )
    _refuse_other_base(folder, adapter.base_digest)
    names = {}
    for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items():
        layer, _, weight = name.removeprefix(_PREFIX).rpartition(".")
        names[f"{layer}.{_NAME}.{weight}"] = tensor
    return names


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter instead of a model."""
    return (folder / ADAPTER_CONFIG).is_file()


def read_base(folder: Path) -> str:
    """Where the model is that an adapter's folder belongs to.

    Raises:
        CheckpointError: it was made for one run and is in no folder.
    """
    base = str(_read(folder, ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    if not base or base.startswith(_RANDOM):
        raise CheckpointError(
            str(folder), "the adapter belongs to a model with random weights; use the run's own `model` folder"
        )
    return base


def merge_folder(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`model` with the adapter of a folder merged into it.

    Raises:
        CheckpointError: the adapter was trained beside another model.
    """
    import peft

    _refuse_other_base(folder, _digest(model))
    merged = peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    return merged


def merged_weights(
    model: PretrainedConfig, config: peft.LoraConfig, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Whole weights of a model with an adapter -> those of the plain model that computes the same, in `dtype`."""
    import peft

    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(model, dtype=dtype)
        peft.inject_adapter_in_model(copy.deepcopy(config), shell, _NAME)
    shell.load_state_dict({name: t.to(dtype) for name, t in weights.items()}, strict=False, assign=True)
    for layer in _layers(shell).values():
        layer.merge()
    merged = {name.replace(".base_layer.", "."): t for name, t in shell.state_dict().items() if ".lora_" not in name}
    # A tied weight may be given under one of its names.
    merged = {name: t for name, t in merged.items() if not (t.is_meta and name in shell.all_tied_weights_keys)}
    assert not any(t.is_meta for t in merged.values()), "every weight was given"
    return merged


def _inject(model: PreTrainedModel, lora: LoraConfig, base: str) -> peft.LoraConfig:
    import peft
    from peft.tuners.lora import Linear

    targets = "all-linear" if list(lora.targets) == ["all-linear"] else list(lora.targets)
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM", base_model_name_or_path=base
    )
    head = model.get_output_embeddings()
    linear = _linear_names(model)
    try:
        peft.inject_adapter_in_model(config, model, _NAME)
    except ValueError as problem:
        raise _wrong_targets(lora, " ".join(str(problem).split()), linear) from None
    for name, layer in _layers(model).items():
        if layer.get_base_layer() is head or not isinstance(layer, Linear):
            raise _wrong_targets(lora, f"{name} is the head or not a linear layer", linear)
    return config


def _refuse_other_base(folder: Path, digest: str) -> None:
    if _read(folder, _BASE_DIGEST).get("xxh3_128") != digest:
        base = _read(folder, ADAPTER_CONFIG).get("base_model_name_or_path")
        raise CheckpointError(
            str(folder), f"the adapter was trained beside other weights than those of {base}; restore them"
        )


def _layers(model: nn.Module) -> dict[str, LoraLayer]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _linear_names(model: PreTrainedModel) -> set[str]:
    """Names of the linear layers an adapter may stand beside: not the head, and none that a mixture of experts has."""
    head, mixtures = model.get_output_embeddings(), [n for n, m in model.named_modules() if hasattr(m, "experts")]
    beside_experts = tuple(f"{name}." for name in mixtures)
    found = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    last = {name.rpartition(".")[2] for name in found}
    return last - {name.rpartition(".")[2] for name in found if name.startswith(beside_experts)}


def _wrong_targets(lora: LoraConfig, reason: str, linear: set[str]) -> ConfigError:
    return ConfigError(
        "lora.targets",
        f"must name linear layers of the model other than its head ({reason})",
        list(lora.targets),
        # peft's all-linear takes routers and experts in, which are no linear layers: it is not always a way out.
        f"use lora.targets=[{','.join(sorted(linear))}] or some of them",
    )


def _digest(model: nn.Module) -> str:
    digest = xxhash.xxh3_128()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        # In fp32, whatever type the folder was opened in.
        digest.update(parameter.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        raise CheckpointError(str(folder), f"has no readable {name}; give a folder that holds an adapter") from None
    if not isinstance(content, dict):
        raise CheckpointError(str(folder), f"{name} does not hold an object; copy the folder again")
    return content


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (list, set)) else value
