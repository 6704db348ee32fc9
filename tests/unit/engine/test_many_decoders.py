"""Tiny random decoders of many classes give transformers' logits and tokens; the path each takes is printed.

`pytest -s` shows the table. Those under `soak` are as many again; the first are one of every kind of mechanism.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tests.support.double import DoublePrecision
from tests.support.zoo import VOCAB, zoo_model
from tests.unit.engine.oracle import chunked_logits, whole_logits
from tests.unit.engine.tiny import engine_config

from farspan.engine.engine import Engine
from farspan.engine.request import SamplingParams

PACKED = [
    "afmoe",
    "apertus",
    "arcee",
    "aria_text",
    "axk1",
    "bailing_hybrid",
    "beam",
    "biogpt",
    "bitnet",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "ctrl",
    "cwm",
    "deepseek_v2",
    "diffllama",
    "dots1",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "exaone_moe",
    "flex_olmo",
    "flint",
    "gemma",
    "gemma4_text",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt-sw3",
    "gpt2",
    "gpt_bigcode",
    "granite",
    "granite_swa",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "helium",
    "hrm_text",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "hy_v3",
    "hyperclovax",
    "internlm3",
    "iquestcoder",
    "jais2",
    "jetmoe",
    "kolibri1",
    "laguna",
    "lfm2_moe",
    "lfm3",
    "mellum",
    "mimo_v2_flash",
    "minicpm3",
    "minimax_m2",
    "ministral",
    "ministral3",
    "modernbert-decoder",
    "nanochat",
    "nemotron_h",
    "olmo",
    "olmo2",
    "olmo3",
    "olmo_hybrid",
    "olmoe",
    "opt",
    "persimmon",
    "phi3",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "seed_oss",
    "smollm3",
    "solar_open",
    "starcoder2",
    "vaultgemma",
    "youtu",
    "zamba2",
    "zaya",
]
STEPWISE = ["falcon_mamba"]
ALONE = [
    "axk2",
    "codegen",
    "deepseek_v4",
    "doge",
    "falcon",
    "gpt_neo",
    "gpt_neox_japanese",
    "gptj",
    "hy_v4",
    "minimax",
    "mpt",
    "nemotron",
    "rwkv",
    "stablelm",
]
KINDS = {
    **dict.fromkeys(PACKED, "packed"),
    **dict.fromkeys(STEPWISE, "packed stepwise"),
    **dict.fromkeys(ALONE, "alone"),
}
NUM_TOKENS = 12
TAKEN: Counter[str] = Counter()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_greedy_tokens_equal_transformers(kind, capsys):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, VOCAB, (2, 24), generator=generator).tolist()
    with DoublePrecision():
        model = zoo_model(kind)
        wanted = [whole_logits(model, row) for row in tokens]
        engine = Engine(model, engine_config(kv_bytes=64 * 1024 * 1024, max_sequences=4))
        for row, position, logits_V in chunked_logits(engine, tokens, 7):
            error = float((logits_V - wanted[row][position]).abs().max())
            assert error <= 1e-8 * max(1.0, float(wanted[row][position].abs().max()))
        answer = list(engine.generate([tokens[0]], SamplingParams(max_tokens=NUM_TOKENS))[0].tokens)
        choices = whole_logits(model, [*tokens[0], *answer])[len(tokens[0]) - 1 : -1].argmax(1).tolist()
    assert answer == choices
    assert len(set(answer)) >= 6, f"a vacuous answer: {answer}"
    engine.check_integrity()
    with capsys.disabled():
        print(f"\n{kind:24} {engine.path}", end="")
    assert engine.path.startswith(KINDS[kind])


def test_there_are_at_least_ninety_kinds_beside_the_first_class_ones():
    from tests.unit.engine.test_architectures import PATHS

    assert len(set(KINDS) - set(PATHS)) >= 90
