"""MLPs and heads by tiles of tokens against themselves computed at once."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tests.support.decoders import decoder_config
from tests.support.live import LiveBytes
from tests.support.relative import relative_error
from torch import Tensor, nn
from transformers import PreTrainedModel

from farspan.activations.tiled import by_tiles, tile_mlps, tile_norms
from farspan.errors import ModelError
from farspan.models.parts import decoder_layers, token_norms, trunk_and_head
from farspan.train.loss import token_losses
from farspan.verify.shrink import small_model

TOKENS_1T = torch.arange(23).unsqueeze(0)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every gradient of the summed loss of one sequence, computed by the model's own forward."""
    model.zero_grad(set_to_none=True)
    logits_TV = model(input_ids=TOKENS_1T, use_cache=False).logits[0]
    nn.functional.cross_entropy(logits_TV[:-1], TOKENS_1T[0, 1:], reduction="sum").backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def largest_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert got.keys() == want.keys()
    return max(relative_error(got[name], want[name]) for name in want)


@pytest.mark.parametrize("tile_tokens", [1, 5, 100])
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "phi", "gemma3_text"])
def test_tiled_mlps_give_the_gradients_of_the_whole_model(architecture: str, tile_tokens: int) -> None:
    model = small_model(decoder_config(architecture))
    want = gradients(model)
    assert len(tile_mlps(model, decoder_layers(model), tile_tokens)) == len(decoder_layers(model))
    # gemma's norms are computed in fp32, whatever the type of the model.
    assert largest_error(gradients(model), want) < (1e-6 if architecture == "gemma3_text" else 1e-12)


@pytest.mark.parametrize("tile_tokens", [1, 5, 100])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3_next", "granitemoehybrid"])
def test_tiled_norms_give_the_gradients_of_the_whole_model(
    architecture: str, recompute: bool, tile_tokens: int
) -> None:
    model = small_model(decoder_config(architecture))
    want = gradients(model)
    tile_norms(token_norms(model), tile_tokens)
    if recompute:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    tiled = [name for name, module in model.named_modules() if "forward" in vars(module)]
    # Two of a layer (gemma has four) and the final one; none inside attention or a mixer.
    assert len(tiled) == len(decoder_layers(model)) * (4 if architecture == "gemma3_text" else 2) + 1
    # They are computed in fp32, whatever the type of the model.
    assert largest_error(gradients(model), want) < 1e-6


def test_norms_that_keep_no_wide_copies_and_those_inside_attention_stay_whole() -> None:
    for architecture in ("gpt_neox", "qwen3"):
        model = small_model(decoder_config(architecture))
        tile_norms(token_norms(model), 5)
        tiled = [name for name, module in model.named_modules() if "forward" in vars(module)]
        assert len(tiled) == (0 if architecture == "gpt_neox" else 2 * len(decoder_layers(model)) + 1)
        assert not any("attn" in name for name in tiled)


def test_tiling_one_model_changes_no_other_and_no_name_of_a_weight() -> None:
    model = small_model(decoder_config("llama"))
    other, names = deepcopy(model), list(model.state_dict())
    tile_mlps(model, decoder_layers(model), 4)
    assert list(model.state_dict()) == names
    assert all("forward" not in vars(module) for module in other.modules())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_tiled_mlps_inside_recomputed_layers_give_the_same_gradients(use_reentrant: bool) -> None:
    model = small_model(decoder_config("llama")).train()
    want = gradients(model)
    tile_mlps(model, decoder_layers(model), 5)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert largest_error(gradients(model), want) < 1e-12


def with_adapters(dropout: float = 0.0) -> PreTrainedModel:
    model = small_model(decoder_config("llama"))
    config = LoraConfig(
        r=2, lora_alpha=8, lora_dropout=dropout, init_lora_weights=False,
        target_modules=["up_proj", "down_proj", "q_proj", "lm_head"],
    )  # fmt: skip
    return inject_adapter_in_model(config, model).double()


def test_adapters_in_tiled_mlps_get_their_gradients_and_frozen_weights_none() -> None:
    model = with_adapters()
    want = gradients(model)
    assert all("lora_" in name for name in want)
    tile_mlps(model, decoder_layers(model), 5)
    assert largest_error(gradients(model), want) < 1e-12


def test_a_head_with_an_adapter_gives_the_loss_and_gradients_of_all_logits_at_once() -> None:
    model = with_adapters()
    _, head = trunk_and_head(model)
    assert head.plain is None
    hidden_TE = torch.randn(23, model.config.hidden_size, dtype=torch.float64, requires_grad=True)
    labels_T = torch.arange(23)
    labels_T[3:9] = -100
    adapters = [p for p in head.linear.parameters() if p.requires_grad]
    want_T = nn.functional.cross_entropy(head(hidden_TE), labels_T, reduction="none")
    got_T = token_losses(head, hidden_TE, labels_T, tile_tokens=4)
    assert relative_error(got_T, want_T) < 1e-12
    for scale in (1.0, 1 / 8):
        want = torch.autograd.grad(scale * want_T.sum(), [hidden_TE, *adapters], retain_graph=True)
        got = torch.autograd.grad(scale * got_T.sum(), [hidden_TE, *adapters], retain_graph=True)
        assert all(relative_error(g, w) < 1e-12 for g, w in zip(got, want, strict=True))


def test_a_hook_on_a_weight_sees_its_gradient_once() -> None:
    model = small_model(decoder_config("llama"))
    tile_mlps(model, decoder_layers(model), 5)
    weight, seen = decoder_layers(model)[0].mlp.up_proj.weight, []
    weight.register_hook(lambda grad: seen.append(grad.clone()))
    found = gradients(model)["model.layers.0.mlp.up_proj.weight"]
    assert len(seen) == 1
    assert torch.equal(seen[0], found)


def test_mixtures_of_experts_are_left_alone_and_a_model_of_nothing_else_is_refused() -> None:
    model = small_model(decoder_config("qwen3_moe"))
    with pytest.raises(ModelError, match="mixtures of experts cannot be tiled"):
        tile_mlps(model, decoder_layers(model), 4)
    assert all("forward" not in vars(module) for module in model.modules())


class TakesResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x_TE: Tensor, residual_TE: Tensor) -> Tensor:
        return self.up(x_TE) + residual_TE


def test_an_mlp_that_is_given_more_than_its_rows_is_left_alone() -> None:
    model = small_model(decoder_config("llama"))
    first, *others = decoder_layers(model)
    first.mlp = TakesResidual()
    assert tile_mlps(model, [first, *others], 4) == [layer.mlp for layer in others]


def test_dropout_inside_a_tiled_mlp_is_refused() -> None:
    model = with_adapters(dropout=0.1)
    with pytest.raises(ModelError, match=r"p = 0.1.*set dropout to 0"):
        tile_mlps(model, decoder_layers(model), 4)


def test_weights_that_zero3_would_free_in_the_middle_of_a_tile_are_refused() -> None:
    model = small_model(decoder_config("llama"))
    mlp, *_ = tile_mlps(model, decoder_layers(model), 4)
    mlp.up_proj.weight.ds_id = 0  # DeepSpeed's mark on a weight it scatters.
    with pytest.raises(ModelError, match=r"set_z3_leaf_module\(module, True\)"):
        gradients(model)


def test_the_widest_activation_of_all_tokens_never_exists_at_once() -> None:
    num_tokens, narrow, wide = 8192, 16, 2048
    first, second = (torch.randn(*shape, requires_grad=True) for shape in ((wide, narrow), (narrow, wide)))
    x_TE = torch.randn(num_tokens, narrow, requires_grad=True)

    def step() -> None:
        weights = {"first": first, "second": second}
        by_tiles(lambda w, x, rows: (x @ w["first"].t()).relu() @ w["second"].t(), weights, x_TE, 128).sum().backward()

    step()
    with LiveBytes() as live:
        step()
    assert live.peak < num_tokens * wide * 4 / 4
