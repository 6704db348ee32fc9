"""The plain side of a probe computes what the run is trained on, not the likelihood alone."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from tests.support.decoders import decoder_config
from tests.support.relative import relative_error

from farspan.batch import ShardedBatch
from farspan.models.attention import use_farspan_attention
from farspan.parallel.documents import attend_documents
from farspan.train.loss import PackedLoss
from farspan.verify.cases import ProbeSequence
from farspan.verify.live import Objective, plain_answers, probed_weights
from farspan.verify.shrink import VOCAB, small_model

SEQUENCE = ProbeSequence((0, 5, 6, 20), seed=1)


@pytest.mark.parametrize("objective", [Objective(), Objective(label_smoothing=0.2, z_loss=0.05)], ids=str)
def test_a_probe_compares_a_smoothed_loss_with_the_same_of_plain_transformers(objective: Objective) -> None:
    model = small_model(decoder_config("llama"))
    names = probed_weights(model)
    exact, _ = plain_answers(copy.deepcopy(model), SEQUENCE, names, torch.float64, objective)
    use_farspan_attention(model)
    batch = SEQUENCE.batch(VOCAB)
    shard = ShardedBatch(batch.tokens_T, batch.labels_T, batch.positions_T, batch.bounds)
    loss = PackedLoss(model, 7, label_smoothing=objective.label_smoothing, z_loss=objective.z_loss)
    got = loss(shard, partial(attend_documents, bounds=batch.bounds), torch.tensor(17.0))
    got.backward()
    # transformers computes norms in fp32 whatever the type of the model: sums in another order show there.
    assert got.item() == pytest.approx(exact.loss, rel=1e-6)
    assert exact.gradients.keys() == set(names)
    for name in names:
        assert relative_error(model.get_parameter(name).grad, exact.gradients[name]) < 1e-5, name


def test_what_a_run_adds_to_the_likelihood_is_no_rounding_a_probe_would_forgive() -> None:
    model = small_model(decoder_config("llama"))
    names = probed_weights(model)
    plain, smoothed = (
        plain_answers(copy.deepcopy(model), SEQUENCE, names, torch.float64, objective)[0].loss
        for objective in (Objective(), Objective(label_smoothing=0.2, z_loss=0.05))
    )
    assert abs(smoothed - plain) > 1e-2 * plain
