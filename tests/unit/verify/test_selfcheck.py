"""The self-check before a run: farspan's forward is the model's own, or the model is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.decoders import decoder_config
from transformers import CONFIG_MAPPING

import farspan.models.attention
import farspan.verify.selfcheck
from farspan.errors import ModelError
from farspan.models.attention import use_farspan_attention
from farspan.models.parts import decoder_layers
from farspan.verify.selfcheck import check_model
from farspan.verify.shrink import kept_layers, small_model

# Right without one line about them.
MORE = ["granite", "cohere", "olmo2", "phi3", "starcoder2", "qwen3_moe", "gpt_oss"]
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon": ("does not compute attention through transformers' attention registry", {}),
    "stablelm": ("did not pass farspan_attention on", {}),
}


@pytest.mark.parametrize("architecture", MORE)
def test_a_decoder_nobody_prepared_for_is_exact(architecture: str) -> None:
    check_model(decoder_config(architecture))


@pytest.mark.parametrize("architecture", REFUSED)
def test_a_decoder_that_cannot_be_exact_is_refused_with_the_reason(architecture: str) -> None:
    reason, settings = REFUSED[architecture]
    with pytest.raises(ModelError, match=reason):
        check_model(CONFIG_MAPPING[architecture](**settings))


def test_the_small_copy_keeps_what_decides_and_shrinks_what_does_not() -> None:
    config = decoder_config("gemma2")
    small = small_model(config).config
    assert small.layer_types == config.layer_types[: len(kept_layers(config))]
    assert set(small.layer_types) == set(config.layer_types)
    assert (small.attn_logit_softcapping, small.final_logit_softcapping) == (50.0, 30.0)
    assert small.num_attention_heads // small.num_key_value_heads == 2
    assert small.sliding_window == 7
    assert small.hidden_size <= 64


def test_the_small_copy_is_the_same_on_every_process() -> None:
    first, second = (small_model(decoder_config("llama")).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_attention_is_switched_on_one_model_and_no_other() -> None:
    ours, plain = small_model(decoder_config("llama")), small_model(decoder_config("llama"))
    tokens = torch.arange(9).unsqueeze(0)
    before = plain(input_ids=tokens).logits
    use_farspan_attention(ours)
    assert torch.equal(plain(input_ids=tokens).logits, before)
    with pytest.raises(ModelError, match="did not pass farspan_attention on"):
        ours(input_ids=tokens)


def test_the_modules_of_a_hybrid_keep_their_names_and_answer_as_before() -> None:
    model = small_model(decoder_config("qwen3_next"))
    names = list(model.state_dict())
    mixer: Any = decoder_layers(model)[0].linear_attn
    hidden = torch.randn(1, 5, model.config.hidden_size, dtype=torch.float64)
    before = mixer(hidden_states=hidden)
    use_farspan_attention(model)
    use_farspan_attention(model)
    assert list(model.state_dict()) == names
    assert type(mixer).forward is not mixer.forward.__func__
    assert torch.equal(mixer(hidden_states=hidden), before)


# A field that farspan reads and this model ignores: what the rules say is then not what the model does.
MISREAD = {
    "layer 0 .attention with window 7. differs": {"sliding_window": 4096},
    "changes its logits after the linear head": {"logits_scaling": 2.0},
    "layer 0 .attention with chunk 6. differs": {"attention_chunk_size": 4096},
}


@pytest.mark.parametrize("reason", MISREAD)
def test_a_rule_that_is_not_what_the_model_does_is_found_and_its_layer_named(reason: str) -> None:
    with pytest.raises(ModelError, match=f"would not be trained exactly: .*{reason}"):
        check_model(decoder_config("llama", **MISREAD[reason]))


def test_a_scale_that_follows_the_place_in_a_call_is_seen_even_if_no_rule_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for room in (farspan.verify.selfcheck, farspan.models.attention):
        monkeypatch.setattr(room, "refuse_unsupported", lambda config: None)
    with pytest.raises(ModelError, match=r"layer 3 .full attention. differs"):
        check_model(decoder_config("llama4_text", attn_temperature_tuning=True))
