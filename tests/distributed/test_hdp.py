"""Documents on ranks of their own: exact against one process, silent where a document fits one rank, never stuck."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.support.hybrid import full_batch, hybrid_gradients, hybrid_run, long_tailed_corpus
from tests.support.ranks import RankPool
from tests.support.relative import relative_error
from tests.support.whole import whole_of

from farspan.config.schema import RunConfig
from farspan.data.balance import MicroBatch
from farspan.errors import TrainingError
from farspan.models.checkpoint import make_config
from farspan.parallel.exchange import Counter
from farspan.parallel.ranksets import RankSets
from farspan.plan.facts import model_facts
from farspan.plan.hybrid import document_bytes
from farspan.telemetry.events import StepReport
from farspan.train.build import build
from farspan.train.loop import train

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return long_tailed_corpus(tmp_path_factory.mktemp("hybrid"))


MIXES = {
    "1 process": ["parallel.workers=1", "parallel.strategy=ring"],
    "2 processes, ring": ["parallel.workers=2", "parallel.rank_tokens=256", "parallel.strategy=ring"],
    "3 processes, ring": ["parallel.workers=3", "parallel.rank_tokens=180", "parallel.strategy=ring", "seed=3"],
    "4 processes, ring": ["parallel.workers=4", "parallel.rank_tokens=128", "parallel.strategy=ring", "seed=5"],
    "4 processes, auto, accumulation 2": [
        *["parallel.workers=4", "parallel.rank_tokens=200", "parallel.strategy=auto", "train.accumulation=2"]
    ],
    "3 processes, ulysses": ["parallel.workers=3", "parallel.rank_tokens=200", "seed=7"],
    "4 processes, tokenring, recompute": [
        *["parallel.workers=4", "parallel.rank_tokens=150", "parallel.strategy=tokenring", "train.recompute=true"]
    ],
    "3 processes, allgather, tiled mlp": [
        *["parallel.workers=3", "parallel.rank_tokens=150", "parallel.strategy=allgather", "memory.tiled_mlp=true"]
    ],
    "4 processes, as sp 4 would read": ["parallel.workers=4", "parallel.sp=4", "train.accumulation=3"],
}


@pytest.mark.parametrize("name", MIXES)
def test_loss_and_every_gradient_of_every_step_equal_the_full_batch_in_one_process(
    ranks: RankPool, corpus: str, tmp_path: Path, name: str
) -> None:
    config = hybrid_run(corpus, tmp_path, *MIXES[name])
    want = full_batch(config, tmp_path, 2)
    for answers in ranks.run(hybrid_gradients, config.parallel.workers, config, str(tmp_path / "cache"), 2):
        for (loss, grads, _), (want_loss, expected) in zip(answers, want, strict=True):
            assert abs(loss - want_loss) < 1e-12 * want_loss
            assert grads.keys() == expected.keys()
            for parameter, grad in expected.items():
                assert relative_error(grads[parameter], grad) < 1e-12, parameter


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "tokenring", "allgather"])
def test_documents_send_what_the_formula_says_and_those_that_fit_one_rank_nothing(
    ranks: RankPool, corpus: str, tmp_path: Path, strategy: str
) -> None:
    config = hybrid_run(
        corpus, tmp_path, "parallel.workers=3", "parallel.rank_tokens=180", f"parallel.strategy={strategy}"
    )
    facts = model_facts(make_config("starcoder2", {**config.model.settings, "vocab_size": 300}))
    answers = ranks.run(hybrid_work, 3, config, str(tmp_path / "cache"))
    assert any(not one.shared for own, _, _ in answers for one in own)
    for own, lengths, sent in answers:
        shared = [(len(one.ranks), lengths[one.documents[0]]) for one in own if one.shared]
        assert sent == sum(document_bytes(config, strategy, facts, 8, tokens, n) for n, tokens in shared)
        assert sent > 0


def test_a_step_of_documents_that_fit_one_rank_sends_no_byte(ranks: RankPool, corpus: str, tmp_path: Path) -> None:
    config = hybrid_run(corpus, tmp_path, "parallel.workers=3", "parallel.rank_tokens=512", "train.accumulation=2")
    answers = ranks.run(hybrid_work, 3, config, str(tmp_path / "cache"))
    assert [sent for _, _, sent in answers] == [0, 0, 0]
    assert all(own for own, _, _ in answers)


def hybrid_work(config: RunConfig, cache: str) -> tuple[list[MicroBatch], list[int], int]:
    """(what this rank computes in the first step, the lengths of its documents, bytes it sent)."""
    step = build(config, CPU, Path(cache)).step
    assert step.hybrid is not None
    pieces, plan = step.hybrid.plan(step.reader, range(step.mesh.dp * step.accumulation))
    step.backward()
    return list(plan.work[step.hybrid.sets.rank]), [piece.num_tokens for piece in pieces], step.exchange.bytes_sent


def steps_to_end(config: RunConfig, cache: str) -> dict[int, StepReport]:
    events: list[Any] = []
    train(build(config, CPU, Path(cache)), config, events.append)
    return {e.step: e for e in events if isinstance(e, StepReport)}


@pytest.mark.long
def test_five_training_steps_equal_those_of_the_static_mesh(ranks: RankPool, corpus: str, tmp_path: Path) -> None:
    same = ["parallel.workers=4", "parallel.sp=2", "parallel.strategy=ring", "train.steps=5", "train.accumulation=2"]
    found = {}
    for hdp in ("true", "false"):
        place = tmp_path / hdp
        config = hybrid_run(corpus, place, *same, f"parallel.hdp={hdp}")
        found[hdp] = ranks.run(steps_to_end, 4, config, str(tmp_path / "cache"))[0]
    assert list(found["false"]) == [1, 2, 3, 4, 5]
    assert found["false"][5].loss < found["false"][1].loss
    for step, static in found["false"].items():
        hybrid = found["true"][step]
        assert hybrid.num_labels == static.num_labels
        assert hybrid.loss == pytest.approx(static.loss, rel=1e-10)
        assert hybrid.samples == static.samples != ""
        assert hybrid.model_flops == pytest.approx(static.model_flops, rel=1e-12)
        assert static.model_flops > 0


SIZES = {
    "3 processes, long documents shared": ["parallel.workers=3", "train.accumulation=4", "parallel.rank_tokens=180"],
    "2 processes": ["parallel.workers=2", "train.accumulation=6", "parallel.rank_tokens=300"],
    "1 process": ["parallel.workers=1", "train.accumulation=12"],
    "4 processes, no hdp": ["parallel.workers=4", "train.accumulation=3", "parallel.hdp=false"],
}


@pytest.mark.long
def test_the_hash_of_consumed_samples_is_the_same_for_every_number_of_ranks_with_and_without_hdp(
    ranks: RankPool, corpus: str, tmp_path: Path
) -> None:
    hashes: dict[str, tuple[str, str]] = {}
    for name, more in SIZES.items():
        same = ["parallel.strategy=ring", "train.steps=2", f"output={tmp_path}/{len(hashes)}"]
        config = hybrid_run(corpus, tmp_path, *same, *more)
        told = ranks.run(steps_to_end, config.parallel.workers, config, str(tmp_path / "cache"))
        each = {(reports[1].samples, reports[2].samples) for reports in told}
        assert len(each) == 1, "every rank knows the hash"
        hashes[name] = each.pop()
    assert len(set(hashes.values())) == 1, hashes
    other_seed = hybrid_run(corpus, tmp_path, "parallel.workers=1", "train.accumulation=12", "train.steps=2", "seed=9")
    assert ranks.run(steps_to_end, 1, other_seed, str(tmp_path / "cache"))[0][2].samples != hashes["1 process"][1]


def train_by_a_wrong_plan(config: RunConfig, cache: str, wrong: str) -> str:
    """What a run says whose plan loses or repeats the last documents of rank 0."""
    training = build(config, CPU, Path(cache))
    hybrid = training.step.hybrid
    assert hybrid is not None
    right = hybrid.plan

    def plan(*step: Any) -> Any:
        samples, found = right(*step)
        own, *others = found.work
        return samples, replace(found, work=(own[:-1] if wrong == "lost" else (*own, own[-1]), *others))

    hybrid.plan = plan  # type: ignore[method-assign, assignment]
    try:
        train(training, config, lambda body: None)
    except TrainingError as problem:
        return str(problem)
    return "nothing was said"


@pytest.mark.parametrize(
    ("wrong", "said"), [("lost", "of the 1024 tokens of a step were computed"), ("repeated", "computed 2 times")]
)
def test_a_plan_that_loses_or_repeats_documents_stops_every_rank(
    ranks: RankPool, corpus: str, tmp_path: Path, wrong: str, said: str
) -> None:
    config = hybrid_run(corpus, tmp_path, "parallel.workers=2", "parallel.rank_tokens=512")
    for answer in ranks.run(train_by_a_wrong_plan, 2, config, str(tmp_path / "cache"), wrong):
        assert said in answer


def trained_gradients(config: RunConfig, cache: str) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, every gradient there is) of the first step."""
    step = build(config, CPU, Path(cache)).step
    loss, _ = step.backward()
    named = step.loss.named_parameters()
    return loss.item(), {n: whole_of(p.grad) for n, p in named if p.grad is not None}


@pytest.mark.parametrize(
    ("more", "allowed"),
    [(["lora.rank=4"], 1e-12), (["model.dtype=bfloat16"], 0.05), (["model.dtype=float32"], 1e-5)],
    ids=str,
)
def test_adapters_and_narrow_types_get_the_gradients_of_the_mesh(
    ranks: RankPool, corpus: str, tmp_path: Path, more: list[str], allowed: float
) -> None:
    same = ["parallel.workers=3", "parallel.sp=3", "parallel.strategy=ring", "data.sequence_tokens=516"]
    same += ["train.accumulation=3", *more]
    (loss, grads), (want_loss, want) = (
        ranks.run(
            trained_gradients, 3, hybrid_run(corpus, tmp_path, *same, f"parallel.hdp={hdp}"), str(tmp_path / "cache")
        )[0]
        for hdp in ("true", "false")
    )
    assert abs(loss - want_loss) < allowed * want_loss
    assert grads.keys() == want.keys()
    assert any(float(grad.norm()) > 0 for grad in want.values())
    for name, grad in want.items():
        assert grads[name].dtype == grad.dtype
        assert (grads[name] - grad).norm() <= allowed * grad.norm(), name


def test_recurrent_layers_follow_their_documents_onto_any_ranks(ranks: RankPool, corpus: str, tmp_path: Path) -> None:
    delta = {"linear_value_head_dim": 8, "linear_key_head_dim": 4, "linear_num_key_heads": 4, "head_dim": 8,
             "linear_num_value_heads": 4, "layer_types": "[linear_attention,full_attention]"}  # fmt: skip
    settings = [f"model.settings.{name}={value}" for name, value in delta.items()]
    more = ["parallel.workers=3", "parallel.rank_tokens=90", "parallel.strategy=ring", "data.sequence_tokens=256"]
    config = hybrid_run(corpus, tmp_path, "model.architecture=qwen3_5_text", *settings, *more)
    ((want_loss, want),) = full_batch(config, tmp_path, 1)
    for ((loss, grads, sent),) in ranks.run(hybrid_gradients, 3, config, str(tmp_path / "cache"), 1):
        assert sent > 0
        # Its recurrence is computed in float32.
        assert abs(loss - want_loss) < 1e-5 * want_loss
        for parameter, grad in want.items():
            assert relative_error(grads[parameter], grad) < 1e-4, parameter


def spilled_work(config: RunConfig, cache: str) -> tuple[dict[str, torch.Tensor], int, int, int]:
    """(gradients of a step, bytes sent, bytes stored, most ranks of a document)."""
    step = build(config, CPU, Path(cache)).step
    assert step.hybrid is not None
    _, plan = step.hybrid.plan(step.reader, range(step.mesh.dp * step.accumulation))
    stored, place = 0, step.offload
    if place is not None:
        leave = place.step

        @contextmanager
        def counted(share: float = 1.0) -> Iterator[None]:
            nonlocal stored
            with leave(share):
                yield
            stored += place.report.stored_bytes

        place.step = counted  # type: ignore[method-assign]
    step.backward()
    if place is not None:
        place.close()
    grads = {n: whole_of(p.grad) for n, p in step.loss.named_parameters()}
    return grads, step.exchange.bytes_sent, stored, max(len(one.ranks) for own in plan.work for one in own)


def test_long_documents_whose_activations_leave_use_fewer_ranks_and_give_the_same_gradients(
    ranks: RankPool, corpus: str, tmp_path: Path
) -> None:
    same = ["parallel.workers=3", "parallel.rank_tokens=900", "parallel.strategy=ring", "data.sequence_tokens=1800",
            "train.accumulation=4"]  # fmt: skip
    away = ["memory.offload_activations=cpu", "memory.tiers=[dram:256MiB]", "parallel.spill=0.5"]
    plain, spilled = (
        ranks.run(spilled_work, 3, hybrid_run(corpus, tmp_path, *same, *more), str(tmp_path / "cache"))
        for more in ([], away)
    )
    assert [most for *_, most in plain] == [2, 2, 2]
    assert [most for *_, most in spilled] == [1, 1, 1]
    assert sum(sent for _, sent, _, _ in plain) > 0
    assert sum(sent for _, sent, _, _ in spilled) == 0
    assert sum(stored for _, _, stored, _ in spilled) >= 900 * 32 * 8
    for (grads, *_), (want, *_) in zip(spilled, plain, strict=True):
        for name, grad in want.items():
            assert relative_error(grads[name], grad) < 1e-12, name


def groups_made(config: RunConfig, cache: str) -> tuple[int, int]:
    step = build(config, CPU, Path(cache)).step
    before = dist.get_pg_count()
    step.backward()
    return before, dist.get_pg_count()


def test_no_process_group_is_made_for_a_set_of_ranks(ranks: RankPool, corpus: str, tmp_path: Path) -> None:
    config = hybrid_run(corpus, tmp_path, "parallel.workers=4", "parallel.rank_tokens=128", "parallel.strategy=ring")
    for before, after in ranks.run(groups_made, 4, config, str(tmp_path / "cache")):
        assert before == after


def wait_in_vain() -> tuple[float, str]:
    """A set of two ranks, one of which never comes."""
    sets = RankSets(CPU, Counter(), timeout_s=2)
    started, message = time.perf_counter(), "nothing was raised"
    if sets.rank == 0:
        try:
            sets.of((0, 2)).pass_on([torch.zeros(4)]).wait()
        except Exception as problem:
            message = str(problem)
    waited = time.perf_counter() - started
    dist.barrier()
    return waited, message


def test_a_rank_that_waits_for_one_that_never_comes_is_told_at_the_deadline(ranks: RankPool) -> None:
    waited, message = ranks.run(wait_in_vain, 3)[0]
    assert "imeout" in message or "imed out" in message, message
    assert 1 < waited < 60


def exchanged(members: tuple[int, ...]) -> dict[str, Any] | None:
    """What a set of ranks finds by every exchange."""
    sets = RankSets(CPU, Counter(), timeout_s=60)
    if sets.rank not in members:
        return None
    ours = sets.of(members)
    own, size = ours.rank, len(members)
    x = torch.arange(size * 2, dtype=torch.float64).view(size, 2) + 100 * own
    found = {
        "swapped": ours.swap_rows(x).wait()[0],
        "passed": ours.pass_on([x], 1).wait()[0],
        "gathered": ours.gather([x]).wait()[0],
        "summed": ours.sum_rows([x]).wait()[0],
    }
    return {"rank": own, "sent": ours.bytes_sent, **found}


@pytest.mark.parametrize("members", [(0, 1, 2, 3), (1, 3), (0, 2, 3), (2,)])
def test_any_ranks_exchange_what_a_group_of_them_would(ranks: RankPool, members: tuple[int, ...]) -> None:
    size = len(members)
    each = [torch.arange(size * 2, dtype=torch.float64).view(size, 2) + 100 * rank for rank in range(size)]
    answers = [answer for answer in ranks.run(exchanged, 4, members) if answer is not None]
    assert len(answers) == size
    for rank, found in enumerate(answers):
        assert found["rank"] == rank
        assert torch.equal(found["swapped"], torch.stack([x[rank] for x in each]))
        assert torch.equal(found["passed"], each[(rank - 1) % size])
        assert torch.equal(found["gathered"], torch.stack(each))
        assert torch.equal(found["summed"], torch.stack(each).sum(0)[rank])
        # A row to each of the others twice, and the whole to the next one and to each of the others.
        assert found["sent"] == 16 * (size - 1) * 2 + (16 * size * size if size > 1 else 0)
