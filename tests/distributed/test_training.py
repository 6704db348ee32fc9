"""Training over ranks against plain transformers in one process, and against itself cut differently."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.corpus import small_corpus
from tests.support.hybrid import full_batch
from tests.support.ranks import RankFailed, RankPool
from tests.support.relative import relative_error
from tests.support.runs import TINY, tiny_run
from tests.support.whole import whole_of

from farspan.config.load import load_config
from farspan.config.schema import RunConfig
from farspan.errors import FarspanError
from farspan.models.checkpoint import load_causal_lm, make_config
from farspan.optim.shards import local_of
from farspan.parallel.mesh import make_mesh
from farspan.plan.facts import model_facts
from farspan.plan.run_plan import plan_run
from farspan.telemetry.events import EventBody, Note, RunFinished, StepReport
from farspan.train import checkpoint as checkpoint_room
from farspan.train.build import build
from farspan.train.checkpoint import list_checkpoints
from farspan.train.loop import train

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_corpus(tmp_path_factory.mktemp("training"))


def gradients(config: RunConfig, cache: str) -> tuple[float, dict[str, torch.Tensor], int]:
    """(loss, every whole gradient, bytes sent) of the first step, on one rank."""
    step = build(config, CPU, Path(cache)).step
    loss, _ = step.backward()
    grads = {n.removeprefix("model."): whole_of(p.grad) for n, p in step.loss.named_parameters()}
    return loss.item(), grads, step.exchange.bytes_sent


LAYOUTS = {
    "1 process": ["parallel.workers=1"],
    "sp 2": ["parallel.workers=2", "parallel.sp=2"],
    "sp 4": ["parallel.workers=4", "parallel.sp=4"],
    "dp 2": ["parallel.workers=2"],
    "dp 2 x sp 2": ["parallel.workers=4", "parallel.sp=2"],
    "sp 2, accumulation 3": ["parallel.workers=2", "parallel.sp=2", "train.accumulation=3"],
    "sp 2, recompute": ["parallel.workers=2", "parallel.sp=2", "train.recompute=true"],
    "sp 2, tiled mlp": ["parallel.workers=2", "parallel.sp=2", "memory.tiled_mlp=true", "memory.mlp_tile_tokens=7"],
    "chunks of 24": ["memory.chunk=seco", "memory.chunk_tokens=24"],
    "chunks of 24, sp 2, accumulation 2": [
        *["parallel.workers=2", "parallel.sp=2", "memory.chunk=seco", "memory.chunk_tokens=24", "train.accumulation=2"]
    ],
    "chunks of 16, dp 2 x allgather 2, tiled mlp": [
        *["parallel.workers=4", "parallel.sp=2", "parallel.strategy=allgather", "memory.chunk=seco"],
        *["memory.chunk_tokens=16", "memory.tiled_mlp=true", "memory.mlp_tile_tokens=5"],
    ],
    "ring 2": ["parallel.workers=2", "parallel.sp=2", "parallel.strategy=ring"],
    "ring 4, zigzag of each document": [
        *["parallel.workers=4", "parallel.sp=4", "parallel.strategy=ring", "parallel.layout=document_zigzag"]
    ],
    "ring 2, recompute": ["parallel.workers=2", "parallel.sp=2", "parallel.strategy=ring", "train.recompute=true"],
    "tokenring 4": ["parallel.workers=4", "parallel.sp=4", "parallel.strategy=tokenring"],
    "dp 2 x tokenring 2": ["parallel.workers=4", "parallel.sp=2", "parallel.strategy=tokenring"],
    "hybrid 2 x 2": ["parallel.workers=4", "parallel.sp=4", "parallel.strategy=hybrid", "parallel.ulysses=2"],
    "allgather 2": ["parallel.workers=2", "parallel.sp=2", "parallel.strategy=allgather", "train.accumulation=2"],
    "allgather 4": ["parallel.workers=4", "parallel.sp=4", "parallel.strategy=allgather"],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_and_every_gradient_equal_plain_transformers(
    ranks: RankPool, corpus: str, tmp_path: Path, name: str
) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), *LAYOUTS[name])
    ((want_loss, want),) = full_batch(config, tmp_path, 1)
    for loss, grads, _ in ranks.run(gradients, config.parallel.workers, config, str(tmp_path / "cache")):
        assert abs(loss - want_loss) < 1e-12 * want_loss
        assert grads.keys() == want.keys()
        for parameter, grad in want.items():
            assert relative_error(grads[parameter], grad) < 1e-10, parameter


def test_ranks_that_put_sets_in_other_orders_compute_the_same_gradients(corpus: str, tmp_path: Path) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), *LAYOUTS["sp 2, tiled mlp"])
    pool = RankPool(2, fresh=True)
    try:
        assert len(set(pool.run(hash, 2, "the order of a set"))) == 2
        found = pool.run(gradients, 2, config, str(tmp_path / "cache"))
    finally:
        pool.close()
    ((want_loss, want),) = full_batch(config, tmp_path, 1)
    for loss, grads, _ in found:
        assert abs(loss - want_loss) < 1e-12 * want_loss
        assert max(relative_error(grads[name], want[name]) for name in want) < 1e-10


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in ("1 process", "dp 2", "dp 2 x sp 2")])
def test_the_plan_predicts_the_bytes_that_are_sent(ranks: RankPool, corpus: str, tmp_path: Path, name: str) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), *LAYOUTS[name])
    facts = model_facts(make_config("llama", {**config.model.settings, "vocab_size": 300}))
    answers = ranks.run(gradients, config.parallel.workers, config, str(tmp_path / "cache"))
    assert {sent for _, _, sent in answers} == {plan_run(config, facts, compute_bytes=8).exchange_bytes_per_step}


def offloaded_gradients(config: RunConfig, cache: str) -> tuple[dict[str, torch.Tensor], int]:
    """(every whole gradient of the first step, bytes that left for the tier), on one rank."""
    step = build(config, CPU, Path(cache)).step
    step.backward()
    stored = 0 if step.offload is None else step.offload.report.stored_bytes
    if step.chunks is not None and step.chunks.home is not None:
        stored = step.chunks.home.num_bytes
    step.close()
    return {n: whole_of(p.grad) for n, p in step.loss.named_parameters()}, stored


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["train.recompute=true"],
        ["parallel.strategy=ring"],
        ["train.recompute=true", "memory.swap_share=1"],
    ],
    ids=str,
)
def test_activations_that_wait_in_another_tier_change_no_bit(
    ranks: RankPool, corpus: str, tmp_path: Path, more: list[str]
) -> None:
    layout = ["parallel.workers=2", "parallel.sp=2", "data.sequence_tokens=1024"]
    tiers = ["memory.offload_activations=cxl", "memory.tiers=[cxl:emulated:64MiB]"]
    at_home = [item for item in more if "swap_share" not in item]
    plain, away = (tiny_run(corpus, str(tmp_path / "run"), *layout, *extra) for extra in (at_home, [*more, *tiers]))
    want = ranks.run(offloaded_gradients, 2, plain, str(tmp_path / "cache"))
    for (grads, stored), (expected, _) in zip(
        ranks.run(offloaded_gradients, 2, away, str(tmp_path / "cache")), want, strict=True
    ):
        assert stored >= 512 * 32 * 8
        assert all(torch.equal(grads[name], grad) for name, grad in expected.items())


def shared_swap(config: RunConfig, cache: str) -> tuple[tuple[str, ...], list[EventBody], list[torch.Tensor]]:
    """(what was decided on this rank, events of the whole run, final weights)."""
    training, told = build(config, CPU, Path(cache)), list[EventBody]()
    train(training, config, told.append)
    return training.notes, told, [whole_of(p).detach() for p in training.step.loss.parameters()]


def test_ranks_agree_on_the_share_they_measure_and_train_as_without_it(
    ranks: RankPool, corpus: str, tmp_path: Path
) -> None:
    layout = ["parallel.workers=2", "data.sequence_tokens=1024", "train.recompute=true", "train.steps=2"]
    tiers = ["memory.offload_activations=cxl", "memory.tiers=[cxl:emulated:64MiB]", "memory.swap_share=auto"]
    plain, auto = (
        ranks.run(shared_swap, 2, tiny_run(corpus, str(tmp_path / name), *layout, *more), str(tmp_path / "cache"))
        for name, more in (("plain", []), ("auto", tiers))
    )
    assert auto[0][0] == auto[1][0]
    where, why = auto[0][0]
    assert where.startswith("activations: ")
    assert "in cxl:emulated:64MiB (emulated)" in where
    assert why.startswith("memory.swap_share=auto is ")
    assert "(emulated)" in why
    assert Note(text=why) in auto[0][1]
    # Products cut by rows may be summed otherwise.
    assert losses(auto[0][1]) == pytest.approx(losses(plain[0][1]), rel=1e-12)
    for got, want in zip(auto[0][2], plain[0][2], strict=True):
        assert relative_error(got, want) < 1e-9


@pytest.mark.parametrize("place", ["cpu", "cxl"])
@pytest.mark.parametrize("more", [["memory.chunk=seco"], ["memory.chunk=spaco", "train.recompute=true"]], ids=str)
def test_an_arena_that_lies_in_another_tier_changes_no_bit(
    ranks: RankPool, corpus: str, tmp_path: Path, place: str, more: list[str]
) -> None:
    layout = ["parallel.workers=2", "parallel.sp=2", "memory.chunk_tokens=24", "train.accumulation=2", *more]
    tiers = [f"memory.offload_activations={place}", "memory.tiers=[cxl:emulated:1MiB,cxl:emulated:1MiB]"]
    plain, away = (tiny_run(corpus, str(tmp_path / "run"), *layout, *extra) for extra in ([], tiers))
    want = ranks.run(offloaded_gradients, 2, plain, str(tmp_path / "cache"))
    for (grads, held), (expected, _) in zip(
        ranks.run(offloaded_gradients, 2, away, str(tmp_path / "cache")), want, strict=True
    ):
        # Keys, values and their gradients of 64 tokens, 2 layers and one of 2 heads of 8 numbers, 8 bytes each.
        assert held == 64 * 2 * 4 * 8 * 8
        assert all(torch.equal(grads[name], grad) for name, grad in expected.items())


def test_a_tier_that_is_not_described_is_refused(ranks: RankPool, corpus: str, tmp_path: Path) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), "memory.offload_activations=nvme")
    (message,) = ranks.run(run_refused, 1, config, str(tmp_path / "cache"))
    assert "memory.tiers: must describe a tier of kind nvme" in message


def run_to_end(config: RunConfig, cache: str) -> list[EventBody]:
    events: list[EventBody] = []
    train(build(config, CPU, Path(cache)), config, events.append)
    return events


def losses(events: list[EventBody]) -> dict[int, float]:
    return {e.step: e.loss for e in events if isinstance(e, StepReport)}


def run(ranks: RankPool, config: RunConfig, tmp_path: Path) -> list[EventBody]:
    return ranks.run(run_to_end, config.parallel.workers, config, str(tmp_path / "cache"))[0]


TWO_RANKS = ["parallel.workers=2", "parallel.sp=2", "model.dtype=float32"]


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(ranks: RankPool, corpus: str, tmp_path: Path) -> None:
    whole = losses(run(ranks, tiny_run(corpus, str(tmp_path / "whole"), *TWO_RANKS), tmp_path))
    assert list(whole) == [1, 2, 3, 4]
    # Four steps on other tokens each: what a model learns by them shows elsewhere.
    assert len(set(whole.values())) == 4
    halted = tiny_run(corpus, str(tmp_path / "halted"), *TWO_RANKS, "train.checkpoint_every=2")
    run(ranks, halted, tmp_path)
    shutil.rmtree(tmp_path / "halted" / "checkpoints" / "step-00000004")
    resumed = losses(run(ranks, halted, tmp_path))
    # Bit for bit: the same ranks, the same order of arithmetic.
    assert resumed == {3: whole[3], 4: whole[4]}


@pytest.mark.soak
def test_a_run_stopped_at_many_steps_goes_on_as_if_it_had_not_stopped(
    ranks: RankPool, corpus: str, tmp_path: Path
) -> None:
    steps = "train.steps=60"
    whole = losses(run(ranks, tiny_run(corpus, str(tmp_path / "whole"), *TWO_RANKS, steps), tmp_path))
    halted = tiny_run(corpus, str(tmp_path / "halted"), *TWO_RANKS, steps, "train.checkpoint_every=1")
    run(ranks, halted, tmp_path)
    for step in (59, 41, 40, 17, 3, 1):
        for later in range(step + 1, 61):
            shutil.rmtree(tmp_path / "halted" / "checkpoints" / f"step-{later:08d}")
        assert losses(run(ranks, halted, tmp_path)) == {s: whole[s] for s in range(step + 1, 61)}


def test_a_run_resumed_on_another_number_of_processes_reads_the_same_tokens(
    ranks: RankPool, corpus: str, tmp_path: Path
) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), "parallel.workers=4", "parallel.sp=4", "train.checkpoint_every=2")
    whole = losses(run(ranks, config, tmp_path))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    fewer = tiny_run(corpus, str(tmp_path / "run"), "parallel.workers=1")
    resumed = losses(run(ranks, fewer, tmp_path))
    assert resumed == pytest.approx({3: whole[3], 4: whole[4]}, rel=1e-6)


def test_a_torn_checkpoint_is_passed_over_for_the_one_before(ranks: RankPool, corpus: str, tmp_path: Path) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), *TWO_RANKS, "train.checkpoint_every=2")
    first = losses(run(ranks, config, tmp_path))
    torn = tmp_path / "run" / "checkpoints" / "step-00000004" / "optimizer.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1] + b"x")
    assert losses(run(ranks, config, tmp_path)) == {3: first[3], 4: first[4]}


def test_a_checkpoint_whose_upload_was_cut_off_is_not_there(ranks: RankPool, corpus: str, tmp_path: Path) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), *TWO_RANKS, "train.checkpoint_every=2")
    first = losses(run(ranks, config, tmp_path))
    (tmp_path / "run" / "checkpoints" / "step-00000004" / "farspan_manifest.json").unlink()
    assert [uri[-8:] for uri in list_checkpoints(config.output)] == ["00000002"]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    assert losses(run(ranks, config, tmp_path)) == {3: first[3], 4: first[4]}


def test_a_mixture_of_experts_resumes_although_its_weights_are_renamed_when_saved(
    ranks: RankPool, corpus: str, tmp_path: Path
) -> None:
    settings = [
        f"data.corpus={corpus}",
        "data.sequence_tokens=64",
        "model.architecture=mixtral",
        "model.dtype=float32",
        "train.steps=4",
        "train.checkpoint_every=2",
        *[f"model.settings.{name}={value}" for name, value in TINY.items()],
        "model.settings.num_local_experts=2",
        "model.settings.sliding_window=null",
    ]
    config = load_config(RunConfig, None, [*settings, f"output={tmp_path / 'run'}"])
    whole = losses(run(ranks, config, tmp_path))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    assert losses(run(ranks, config, tmp_path)) == {3: whole[3], 4: whole[4]}


def test_steps_already_reached_are_said_and_not_counted_backwards(ranks: RankPool, corpus: str, tmp_path: Path) -> None:
    run(ranks, tiny_run(corpus, str(tmp_path / "run"), "train.steps=2"), tmp_path)
    events = run(ranks, tiny_run(corpus, str(tmp_path / "run"), "train.steps=1"), tmp_path)
    assert [e.text for e in events if isinstance(e, Note)][-1].startswith("train.steps=1 is already reached")
    assert [e.steps for e in events if isinstance(e, RunFinished)] == [0]


def timeouts_of_groups() -> set[float]:
    mesh = make_mesh("cpu", 2, 2, timeout_s=77)
    groups = [*mesh.axes.get_all_groups(), *mesh.sequence.get_all_groups(), *mesh.all.get_all_groups()]
    return {group._get_backend(CPU).options._timeout.total_seconds() for group in groups}


def test_every_group_of_the_mesh_has_the_deadline_of_the_config(ranks: RankPool) -> None:
    assert ranks.run(timeouts_of_groups, 4) == [{77.0}] * 4


def test_a_model_and_a_corpus_of_different_tokenizers_are_refused(ranks: RankPool, corpus: str, tmp_path: Path) -> None:
    run(ranks, tiny_run(corpus, str(tmp_path / "run"), "train.steps=1", vocab_size=400), tmp_path)
    source = f"model.source={tmp_path / 'run' / 'model'}"
    again = tiny_run(corpus, str(tmp_path / "again"), source, "train.steps=1")
    assert len(losses(run(ranks, again, tmp_path))) == 1
    other = small_corpus(tmp_path / "other", vocab_size=310)
    with pytest.raises(RankFailed, match=r"must be built with the tokenizer of model\.source"):
        run(ranks, tiny_run(other, str(tmp_path / "third"), source), tmp_path)


def test_a_run_with_other_data_does_not_resume(ranks: RankPool, corpus: str, tmp_path: Path) -> None:
    run(ranks, tiny_run(corpus, str(tmp_path / "run"), "train.steps=1"), tmp_path)
    with pytest.raises(RankFailed, match=r"written with seed=0, this run has 7; .*train.resume=false"):
        run(ranks, tiny_run(corpus, str(tmp_path / "run"), "seed=7"), tmp_path)


def test_a_run_with_another_kind_of_optimizer_states_does_not_resume(
    ranks: RankPool, corpus: str, tmp_path: Path
) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), "train.steps=1", "model.dtype=float32")
    run(ranks, config, tmp_path)
    other = tiny_run(corpus, config.output, "model.dtype=float32", "optim.kind=adamw8bit")
    with pytest.raises(RankFailed, match=r"written with optim.kind=adamw, this run has adamw8bit; .*train.resume=fal"):
        run(ranks, other, tmp_path)


def test_the_published_model_is_an_ordinary_hugging_face_folder(ranks: RankPool, corpus: str, tmp_path: Path) -> None:
    run(ranks, tiny_run(corpus, str(tmp_path / "run"), *TWO_RANKS, "train.steps=2"), tmp_path)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    ours = load_causal_lm(tmp_path / "run" / "checkpoints" / "step-00000002", torch.float32)
    text = "def f(x):\n    return x\n"
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "run" / "model")(text)["input_ids"]])
    assert torch.equal(plain(ids).logits, ours(ids).logits)
    assert plain.lm_head.weight.data_ptr() == plain.model.embed_tokens.weight.data_ptr()


def run_refused(config: RunConfig, cache: str) -> str:
    try:
        run_to_end(config, cache)
    except FarspanError as problem:
        return str(problem)
    return "nothing was raised"


def test_a_full_disk_stops_every_rank_and_shows_no_checkpoint(
    ranks: RankPool, corpus: str, tmp_path: Path, small_disk: Path
) -> None:
    config = tiny_run(corpus, str(small_disk / "run"), *TWO_RANKS, "train.steps=1")
    for message in ranks.run(run_refused, 2, config, str(tmp_path / "cache")):
        assert "full" in message or "space" in message.lower(), message
    assert list_checkpoints(config.output) == []
    assert [p for p in (small_disk / "run").rglob("*") if p.is_file() and not p.name.startswith(".")] == []


def fail_on_rank_0() -> str:
    def act() -> Any:
        raise OSError(28, "No space left on device")

    try:
        checkpoint_room.on_rank_0(act)
    except Exception as problem:
        return str(problem)
    return "nothing was raised"


def test_a_failure_on_rank_0_reaches_every_rank_instead_of_hanging_them(ranks: RankPool) -> None:
    answers = ranks.run(fail_on_rank_0, 4)
    assert set(answers) == {"rank 0 failed: OSError: [Errno 28] No space left on device"}


def build_on_another_processor(config: RunConfig, cache: str) -> str:
    """As if this rank's processor multiplied bf16 and the others did not."""
    with pytest.MonkeyPatch.context() as patch:
        native = torch.distributed.get_rank() == 1
        patch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
        try:
            build(config, CPU, Path(cache))
        except FarspanError as problem:
            return str(problem)
    return "nothing was raised"


def test_processors_that_mean_different_types_by_auto_are_refused(ranks: RankPool, corpus: str, tmp_path: Path) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), "parallel.workers=2", "model.dtype=auto")
    for message in ranks.run(build_on_another_processor, 2, config, str(tmp_path / "cache")):
        assert message.startswith("model.dtype: auto means bfloat16 and float32 on the machines of this run")


def run_with_nan(config: RunConfig, cache: str) -> tuple[str, bool]:
    training = build(config, CPU, Path(cache))
    before = [whole_of(p).clone() for p in training.step.loss.parameters()]
    with torch.no_grad():
        local_of(next(training.step.loss.parameters()))[0, 0] = float("nan")
    message = "nothing was raised"
    try:
        training.step.run(0)
    except Exception as problem:
        message = str(problem)
    after = [whole_of(p) for p in training.step.loss.parameters()]
    return message, all(torch.equal(a, b) for a, b in list(zip(before, after, strict=True))[1:])


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_weights(
    ranks: RankPool, corpus: str, tmp_path: Path
) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), "parallel.workers=2", "parallel.sp=2")
    for message, unchanged in ranks.run(run_with_nan, 2, config, str(tmp_path / "cache")):
        assert "weights were not changed; lower optim.lr" in message
        assert unchanged
