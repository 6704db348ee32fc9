"""Operations a step cannot do without, against torch's own counter of what a forward and a backward multiply."""

from __future__ import annotations

import pytest
import torch
from tests.support.runs import tiny_run
from torch.utils.flop_counter import FlopCounterMode

from farspan.models.checkpoint import make_config, random_causal_lm
from farspan.train.useful import table_peak, useful_work


@pytest.mark.parametrize("tied", ["true", "false"])
def test_the_count_equals_torchs_counter_but_for_masked_pairs(tied: str) -> None:
    config = tiny_run("corpus", "run", tie_word_embeddings=tied)
    settings = {**config.model.settings, "vocab_size": 300, "attention_dropout": 0.0}
    shape = make_config("llama", settings)
    shape._attn_implementation = "eager"
    model = random_causal_lm(shape, 0)
    tokens = 16
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(tokens)[None], use_cache=False).logits.sum().backward()
    work = useful_work(config, shape)
    assert work is not None
    vectors = sum(p.numel() for p in model.parameters() if p.ndim < 2)
    # torch multiplies the masked half of the pairs too; norms' weights are parameters and no products.
    square = 2 * work.per_pair * tokens * tokens
    products = (work.per_token - 6 * vectors) * tokens
    # Rotary angles are one more product, of a few numbers.
    assert counter.get_total_flops() == pytest.approx(products + square, rel=0.005)


def test_documents_attend_only_to_themselves_and_windows_only_so_far() -> None:
    config = tiny_run("corpus", "run")
    work = useful_work(config, make_config("llama", {**config.model.settings, "vocab_size": 300}))
    assert work is not None
    one, two = work.flops((0, 8)), work.flops((0, 4, 8))
    assert one - two == 2 * work.per_pair * (36 - 20)


def test_experts_are_not_counted_as_if_every_token_met_them_all() -> None:
    config = tiny_run("corpus", "run")
    shape = make_config("mixtral", {**config.model.settings, "vocab_size": 300, "num_local_experts": 4})
    assert useful_work(config, shape) is None


def test_the_peak_of_a_known_device_is_its_data_sheets() -> None:
    assert table_peak("NVIDIA H100 80GB HBM3")[0] == 989e12
    assert table_peak("NVIDIA A100-SXM4-40GB")[0] == 312e12
    flops, source = table_peak("Some Accelerator 9000")
    assert flops == 0
    assert "set resources.peak_tflops" in source
