"""The loss of a packed shard against torch's own cross entropy, and where there is nothing to learn."""

from __future__ import annotations

from functools import partial

import peft
import pytest
import torch
from tests.support.decoders import decoder_config
from tests.support.relative import relative_error

from farspan.batch import IGNORED_LABEL, ShardedBatch
from farspan.models.attention import use_farspan_attention
from farspan.parallel.documents import attend_documents
from farspan.train.loss import PackedLoss
from farspan.verify.shrink import small_model

BOUNDS = (0, 5, 12)


def shard(labels_T: torch.Tensor) -> ShardedBatch:
    positions_T = torch.cat([torch.arange(5), torch.arange(7)])
    return ShardedBatch(torch.arange(12), labels_T, positions_T, BOUNDS)


@pytest.mark.parametrize("tile_tokens", [1, 5, 100])
def test_the_tiled_loss_of_a_capped_head_equals_one_cross_entropy_over_the_models_logits(tile_tokens: int) -> None:
    model = small_model(decoder_config("gemma2", final_logit_softcapping=2.0))
    labels_T = torch.arange(12) + 1
    labels_T[[4, 11, 2]] = IGNORED_LABEL
    documents = [model(input_ids=torch.arange(a, b).unsqueeze(0)).logits[0] for a, b in ((0, 5), (5, 12))]
    want = torch.nn.functional.cross_entropy(torch.cat(documents), labels_T, ignore_index=IGNORED_LABEL)
    use_farspan_attention(model)
    attention = partial(attend_documents, bounds=BOUNDS)
    got = PackedLoss(model, tile_tokens)(shard(labels_T), attention, torch.tensor(9.0))
    # transformers' eager attention, which a soft cap needs, takes its softmax in fp32.
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


def test_smoothed_labels_a_z_loss_and_a_weight_for_every_token_equal_the_formula_over_the_models_logits() -> None:
    model = small_model(decoder_config("llama"))
    labels_T, weights_T = torch.arange(12) + 1, torch.linspace(0.0, 2.0, 12, dtype=torch.float64)
    labels_T[[4, 11]] = IGNORED_LABEL
    documents = [model(input_ids=torch.arange(a, b).unsqueeze(0)).logits[0] for a, b in ((0, 5), (5, 12))]
    logits_TV = torch.cat(documents)
    smoothed_T = torch.nn.functional.cross_entropy(
        logits_TV, labels_T, ignore_index=IGNORED_LABEL, label_smoothing=0.1, reduction="none"
    )
    z_T = 0.01 * logits_TV.logsumexp(-1) ** 2 * (labels_T != IGNORED_LABEL)
    want = ((smoothed_T + z_T) * weights_T).sum() / 9
    use_farspan_attention(model)
    loss = PackedLoss(model, 5, label_smoothing=0.1, z_loss=0.01)
    attention = partial(attend_documents, bounds=BOUNDS)
    got = loss(shard(labels_T), attention, torch.tensor(9.0), weights_T=weights_T)
    assert got.item() == pytest.approx(want.item(), rel=1e-12)


def test_a_head_with_an_adapter_smooths_labels_and_adds_a_z_loss_as_the_formula_does() -> None:
    model = small_model(decoder_config("llama"))
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["lm_head"]), model.double())
    generator = torch.Generator().manual_seed(0)
    for p in (p for p in model.parameters() if p.requires_grad):
        p.data = torch.randn(p.shape, dtype=torch.float64, generator=generator) / 10
    labels_T = torch.arange(12) + 1
    labels_T[[4, 11]] = IGNORED_LABEL
    logits_TV = torch.cat([model(input_ids=torch.arange(a, b).unsqueeze(0)).logits[0] for a, b in ((0, 5), (5, 12))])
    smoothed = torch.nn.functional.cross_entropy(
        logits_TV, labels_T, ignore_index=IGNORED_LABEL, label_smoothing=0.1, reduction="sum"
    )
    want = (smoothed + 0.01 * (logits_TV.logsumexp(-1) ** 2 * (labels_T != IGNORED_LABEL)).sum()) / 10
    want.backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    use_farspan_attention(model)
    attention = partial(attend_documents, bounds=BOUNDS)
    loss = PackedLoss(model, 5, label_smoothing=0.1, z_loss=0.01)(shard(labels_T), attention, torch.tensor(10.0))
    loss.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    assert wanted, "the head's two matrices are trained"
    for name, p in model.named_parameters():
        if p.grad is not None:
            # Logits by tiles of rows: sums in another order.
            assert relative_error(p.grad, wanted[name]) < 1e-12, name


def test_a_step_without_one_label_has_loss_zero_and_gradients_zero() -> None:
    model = small_model(decoder_config("llama"))
    use_farspan_attention(model)
    attention = partial(attend_documents, bounds=BOUNDS)
    loss = PackedLoss(model, 5)(shard(torch.full((12,), IGNORED_LABEL)), attention, torch.tensor(0.0))
    loss.backward()
    assert loss.item() == 0.0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(bool((g == 0).all()) for g in gradients)
