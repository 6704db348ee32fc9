"""Adapters as peft makes and computes them, for tests of the engine."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import peft
import torch
from tests.support.double import DoublePrecision
from tests.support.zoo import VOCAB, zoo_model
from torch import Tensor
from transformers import PreTrainedModel

from farspan.engine.engine import Engine
from farspan.engine.request import FailedEvent, SamplingParams
from farspan.engine.terms import Terms

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# What a model has beside q, k, v and o, or instead; "all-linear" would take routers and experts in.
TARGETS: dict[str, Any] = {
    "llama": "all-linear",
    "qwen3": "all-linear",
    "gemma3_text": "all-linear",
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "mixtral": ATTENTION,
    "qwen3_moe": ATTENTION,
    "qwen3_next": [*ATTENTION, "in_proj_qkvz", "out_proj"],
    "jamba": [*ATTENTION, "in_proj", "x_proj"],
    "stablelm": "all-linear",
}
# With others some answers are one token over and over.
SEEDS = {"gpt_neox": 1, "qwen3": 1}
PROMPT_SEEDS = {"gpt_neox": 10, "llama": 2}


@functools.cache
def base_of(architecture: str) -> PreTrainedModel:
    with DoublePrecision():
        return zoo_model(architecture, seed=SEEDS.get(architecture, 0))


def three_adapters(architecture: str) -> dict[str, peft.LoraConfig]:
    """Different ranks, scales and layers: names or all, by a regular expression, in one layer only."""
    targets = TARGETS[architecture]
    some = targets if isinstance(targets, list) else ATTENTION
    return {
        "law": lora(r=4, lora_alpha=8, target_modules=targets),
        "poems": lora(r=3, lora_alpha=5, use_rslora=True, target_modules=rf".*\.(1)\..*({some[0]}|{some[-1]})"),
        "code": lora(
            r=2,
            target_modules=some,
            rank_pattern={some[0]: 5},
            alpha_pattern={some[0]: 7},
            layers_to_transform=[0],
        ),
    }


def lora(**settings: Any) -> peft.LoraConfig:
    # Without an initialization B is random too: an adapter that does something.
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "init_lora_weights": False, **settings})


def save(folder: Path, base: PreTrainedModel, config: peft.LoraConfig, seed: int = 0) -> str:
    """The folder of an adapter with random matrices."""
    torch.manual_seed(seed)
    made = peft.get_peft_model(copy.deepcopy(base), config)
    made.save_pretrained(str(folder))
    return str(folder)


def save_three(folder: Path, architecture: str) -> dict[str, str]:
    base = zoo_model(architecture, seed=SEEDS.get(architecture, 0))
    configs = three_adapters(architecture)
    return {name: save(folder / name, base, config, seed) for seed, (name, config) in enumerate(configs.items())}


def opened(architecture: str, folder: str | None) -> Any:
    """The model with an adapter, as peft opens it; the oracle."""
    base = zoo_model(architecture, seed=SEEDS.get(architecture, 0))
    return base if folder is None else peft.PeftModel.from_pretrained(base, folder).eval()


def logits_of(model: Any, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


def assert_greedy(model: Any, prompt: list[int], answer: list[int]) -> None:
    """Every token is the most likely one after those before it, by one plain forward of peft."""
    assert answer == logits_of(model, [*prompt, *answer])[len(prompt) - 1 : -1].argmax(1).tolist()
    assert len(set(answer)) >= 6, f"a vacuous answer: {answer}"


def rows(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def ask(engine: Engine, asked: dict[str, tuple[str, list[int]]], num_tokens: int = 16) -> dict[str, list[int]]:
    """Answers to requests of (adapter, prompt), computed side by side."""
    for request_id, (adapter, prompt) in asked.items():
        engine.add(request_id, prompt, SamplingParams(max_tokens=num_tokens), terms=Terms(adapter=adapter))
    answers: dict[str, list[int]] = {request_id: [] for request_id in asked}
    while engine.has_work:
        for event in engine.step():
            assert not isinstance(event, FailedEvent), event.error
            answers[event.request_id].append(event.token)
        engine.check_integrity()
    return answers
