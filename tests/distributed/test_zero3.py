"""Tiled MLPs and the fused loss inside DeepSpeed ZeRO-3, two ranks, against plain transformers.

DeepSpeed keeps state of its own in a process, so these ranks are not the shared ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from tests.support.decoders import decoder_config
from tests.support.packed import gradients_by_transformers, num_labels, random_batch
from tests.support.ranks import RankPool
from tests.support.relative import relative_error
from torch import Tensor

from farspan.activations.tiled import tile_mlps, tile_norms
from farspan.batch import ShardedBatch
from farspan.models.attention import use_farspan_attention
from farspan.models.parts import decoder_layers, token_norms
from farspan.parallel.documents import attend_documents
from farspan.train.loss import PackedLoss
from farspan.verify.shrink import VOCAB, small_model

BOUNDS = (0, 13, 60)
ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


@pytest.fixture(scope="module")
def own_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


def zero3_gradients() -> dict[str, Tensor]:
    """Every whole gradient, averaged over ranks, each of which has a sequence of its own."""
    os.environ.update(LOCAL_RANK=str(dist.get_rank()), RANK=str(dist.get_rank()), WORLD_SIZE="2")
    import deepspeed

    model = small_model(decoder_config("llama")).float()
    use_farspan_attention(model)
    tile_norms(token_norms(model), 7)
    for mlp in tile_mlps(model, decoder_layers(model), 7):
        deepspeed.utils.set_z3_leaf_module(mlp, True)
    loss = PackedLoss(model, 7)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=loss, optimizer=optimizer, config=ZERO3, dist_init_required=False)
    batch = random_batch(BOUNDS, VOCAB, seed=dist.get_rank())
    shard = ShardedBatch(batch.tokens_T, batch.labels_T, batch.positions_T, batch.bounds)
    engine.backward(engine(shard, partial(attend_documents, bounds=BOUNDS), num_labels(batch)))
    full = deepspeed.utils.safe_get_full_grad
    return {name.removeprefix("model."): full(p).clone() for name, p in loss.named_parameters()}


def test_tiles_under_zero3_give_the_mean_gradient_of_plain_transformers(own_ranks: RankPool) -> None:
    model = small_model(decoder_config("llama")).float()
    each = [gradients_by_transformers(model, random_batch(BOUNDS, VOCAB, seed))[1] for seed in range(2)]
    for got in own_ranks.run(zero3_gradients, 2):
        assert got.keys() == each[0].keys()
        assert max(relative_error(got[n], (each[0][n] + each[1][n]) / 2) for n in got) < 1e-5
