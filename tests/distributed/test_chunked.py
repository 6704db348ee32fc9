"""Chunk-wise gradients over ranks, with sharded weights, against plain transformers in one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from tests.support.decoders import decoder_config
from tests.support.packed import gradients_by_transformers, num_labels, random_batch, token_losses_by_transformers
from tests.support.ranks import RankFailed, RankPool
from tests.support.relative import relative_error
from torch import Tensor
from torch.distributed.tensor import DTensor

from farspan.activations.tiled import tile_mlps, tile_norms
from farspan.batch import IGNORED_LABEL
from farspan.chunked.evaluate import losses_of
from farspan.chunked.seco import ChunkedStep
from farspan.config.check import CHUNK_SAMPLINGS
from farspan.models.attention import use_farspan_attention
from farspan.models.parts import decoder_layers, token_norms
from farspan.parallel.mesh import make_mesh
from farspan.parallel.shard import shard_weights
from farspan.parallel.strategy import SequenceParallel, SequenceRanks
from farspan.train.loss import PackedLoss
from farspan.verify.shrink import VOCAB, small_model

PACKED = (0, 13, 14, 41, 60)
SEED = 0


def gradients(
    architecture: str, strategy: str, sharded: bool, draw_seed: int | None = None, sampling: str = "independent"
) -> tuple[float, dict[str, Tensor], int]:
    """(loss, every whole gradient, chunks kept) of one sequence on all ranks; the last chunk is ragged."""
    model = small_model(decoder_config(architecture)).train()
    use_farspan_attention(model)
    sequence = sequence_over_all_ranks(strategy)
    step, exchange = ChunkedStep(model, 16, sequence), sequence.ranks.all
    loss = PackedLoss(model, tile_tokens=3)
    if sharded:
        tile_norms(token_norms(model), 3)
        tile_mlps(model, decoder_layers(model), 3)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        mesh = dist.init_device_mesh("cpu", (exchange.num_ranks,))
        shard_weights(loss, decoder_layers(model), mesh, torch.float64)
    batch = random_batch(PACKED, VOCAB)
    shard, draw = step.lay_out(batch.num_tokens).shard(batch, exchange.rank), None
    if draw_seed is not None:
        # Every rank looks at another sequence, of which only one chunk on rank 0 holds labels.
        labels_T = torch.full_like(batch.labels_T, IGNORED_LABEL)
        labels_T[16:32] = 0 if exchange.rank == 0 else IGNORED_LABEL
        generator = torch.Generator().manual_seed(draw_seed)
        flags = replace(batch, labels_T=labels_T)
        kept = sampling == "independent"
        draw = step.draw(flags, 0.5, generator, sampling=sampling, keep_labelled=kept, over_ranks=largest_over_ranks)
    total = step.forward_backward(loss, shard, num_labels(batch), draw)
    dist.all_reduce(total)
    found = {n.removeprefix("model."): _whole(p.grad) for n, p in loss.named_parameters() if p.grad is not None}
    return total.item(), found, 4 if draw is None else draw.num_kept


def sequence_over_all_ranks(strategy: str) -> SequenceParallel:
    """One sequence; a hybrid's neighbours exchange heads two by two."""
    mesh = make_mesh("cpu", dist.get_world_size(), 2 if strategy == "hybrid" else 1, timeout_s=60)
    return SequenceParallel(SequenceRanks.of(mesh), strategy)


def largest_over_ranks(x: Tensor) -> Tensor:
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def _whole(gradient: Tensor) -> Tensor:
    if isinstance(gradient, DTensor):
        return gradient.full_tensor()
    dist.all_reduce(gradient)
    return gradient


@pytest.mark.parametrize("sharded", [False, True], ids=["whole weights", "FSDP2, tiled, recomputed"])
@pytest.mark.parametrize(
    ("architecture", "strategy", "sp"),
    # Over 4 ranks the key heads of qwen2 are copied and its query heads padded.
    [("llama", "ulysses", 2), ("mistral", "allgather", 2), ("qwen2", "ulysses", 4), ("mistral", "hybrid", 4)],
)
def test_chunks_over_ranks_equal_full_backpropagation(
    ranks: RankPool, architecture: str, strategy: str, sp: int, sharded: bool
) -> None:
    want_loss, want = gradients_by_transformers(small_model(decoder_config(architecture)), random_batch(PACKED, VOCAB))
    for loss, got, _ in ranks.run(gradients, sp, architecture, strategy, sharded):
        assert loss == pytest.approx(want_loss, rel=1e-12)
        assert got.keys() == want.keys()
        assert max(relative_error(got[name], want[name]) for name in want) < 1e-12


@pytest.mark.parametrize("sampling", CHUNK_SAMPLINGS)
def test_ranks_with_equal_generators_leave_out_the_same_chunks_and_agree_on_every_gradient(
    ranks: RankPool, sampling: str
) -> None:
    # Norms of this model are computed in fp64: its gradients do not depend on how a sum was scaled.
    found = ranks.run(gradients, 2, "gpt_neox", "ulysses", True, SEED, sampling)
    (loss, first, kept), (other_loss, second, _) = found
    assert kept == (1 if sampling == "importance" else 2), "the seed leaves chunks out"
    assert loss == other_loss
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = ranks.run(gradients, 1, "gpt_neox", "ulysses", False, SEED, sampling)[0]
    assert max(relative_error(first[name], alone[1][name]) for name in first) < 1e-12


def losses(strategy: str) -> Tensor:
    """loss_T of a whole sequence, by chunks over all ranks."""
    model = small_model(decoder_config("mistral"))
    use_farspan_attention(model)
    sequence = sequence_over_all_ranks(strategy)
    step, exchange, batch = ChunkedStep(model, 16, sequence), sequence.ranks.all, random_batch(PACKED, VOCAB)
    layout = step.lay_out(batch.num_tokens)
    mine_t = step.forward_only(losses_of(model, tile_tokens=3), layout.shard(batch, exchange.rank))
    return layout.join(list(exchange.gather([mine_t]).wait()[0]))


@pytest.mark.parametrize("strategy", ["ulysses", "allgather"])
def test_losses_of_tokens_by_chunks_over_2_ranks_equal_one_forward(ranks: RankPool, strategy: str) -> None:
    with torch.no_grad():
        want_T = token_losses_by_transformers(small_model(decoder_config("mistral")), random_batch(PACKED, VOCAB))
    assert all(relative_error(got_T, want_T) < 1e-12 for got_T in ranks.run(losses, 2, strategy))


def test_a_ring_over_chunks_is_refused_by_name(ranks: RankPool) -> None:
    with pytest.raises(RankFailed, match=r"parallel.strategy.*got 'ring'; use parallel.strategy=ulysses"):
        ranks.run(gradients, 2, "llama", "ring", False)
