"""Tiny random decoders of many classes give transformers' logits and tokens; the path each takes is printed.

A vacuous answer (fewer than 6 different tokens) fails: equality on one repeated token proves nothing.
"""

from __future__ import annotations

import pytest
import torch
from tests.support.double import DoublePrecision
from tests.support.zoo import VOCAB, zoo_model
from tests.unit.engine.oracle import chunked_logits, whole_logits
from tests.unit.engine.tiny import engine_config

from farspan.engine.engine import Engine
from farspan.engine.request import SamplingParams

_PACKED = """
afmoe apertus arcee aria_text axk1 bailing_hybrid beam biogpt bitnet cohere cohere2 cohere2_moe ctrl cwm deepseek_v2
diffllama dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint gemma gemma4_text glm glm4 glm4_moe
glm4_moe_lite gpt-sw3 gpt2 gpt_bigcode granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared
helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna
lfm2_moe lfm3 mellum mimo_v2_flash minicpm3 minimax_m2 ministral ministral3 modernbert-decoder nanochat olmo
olmo2 olmo3 olmo_hybrid olmoe opt persimmon phi3 phimoe qwen2_moe qwen3_5_moe_text qwen3_5_text seed_oss smollm3
solar_open starcoder2 vaultgemma youtu zaya
"""
_STEPWISE = ["falcon_mamba"]
_ALONE = """
axk2 codegen deepseek_v4 doge falcon gpt_neo gpt_neox_japanese gptj hy_v4 minimax mpt nemotron rwkv bloom
"""
KINDS = {
    **dict.fromkeys(_PACKED.split(), "packed"),
    **dict.fromkeys(_STEPWISE, "packed stepwise"),
    **dict.fromkeys(_ALONE.split(), "alone"),
}
_NUM_TOKENS = 16
_LEAST_DISTINCT = 6
_MOST_SEEDS = 8


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_greedy_tokens_equal_transformers(kind, capsys):
    with DoublePrecision():
        # Some random weights give a few tokens over and over: other ones then.
        tries = (compare(kind, seed) for seed in range(_MOST_SEEDS))
        path, answer = next((path, answer) for path, answer in tries if len(set(answer)) >= _LEAST_DISTINCT)
    # Alone, how its cache is cut is its own matter.
    assert (path.split()[0] if KINDS[kind] == "alone" else path) == KINDS[kind]
    with capsys.disabled():
        print(f"\n{kind:24} {path:16} {answer}", end="")


def compare(kind: str, seed: int) -> tuple[str, list[int]]:
    """(path taken, greedy answer), after both were held against transformers."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (2, 24), generator=generator).tolist()
    model = zoo_model(kind, seed=seed)
    wanted = [whole_logits(model, row) for row in tokens]
    engine = Engine(model, engine_config(kv_bytes=64 * 1024 * 1024, max_sequences=4))
    for row, position, logits_V in chunked_logits(engine, tokens, 7):
        error = float((logits_V - wanted[row][position]).abs().max())
        assert error <= 1e-8 * max(1.0, float(wanted[row][position].abs().max()))
    answer = list(engine.generate([tokens[0]], SamplingParams(max_tokens=_NUM_TOKENS))[0].tokens)
    choices = whole_logits(model, [*tokens[0], *answer])[len(tokens[0]) - 1 : -1].argmax(1).tolist()
    assert answer == choices
    engine.check_integrity()
    return engine.path, answer


def test_there_are_at_least_ninety_kinds_beside_the_first_class_ones():
    from tests.unit.engine.test_architectures import PATHS

    assert len(set(KINDS) - set(PATHS)) >= 90
