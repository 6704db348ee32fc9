"""Checkpoints written behind the steps, in one piece per rank: nothing is lost, on any other number of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.support.corpus import small_corpus
from tests.support.ranks import RankFailed, RankPool
from tests.support.runs import tiny_run
from tests.support.s3 import S3Bucket

from farspan.config.schema import RunConfig
from farspan.jobs.export import export_checkpoint
from farspan.models.checkpoint import load_causal_lm
from farspan.storage.publish import fetch_folder
from farspan.telemetry.events import CheckpointPublished, EventBody, Note, RunFinished, RunPreempted, StepReport
from farspan.train.build import build
from farspan.train.checkpoint import list_steps
from farspan.train.elastic import Size, at_size, legal_sizes
from farspan.train.loop import train
from farspan.train.outside import NothingOutside
from farspan.train.retention import expired

CPU = torch.device("cpu")
ASYNC = ["model.dtype=float32", "train.checkpoint_async=true", "train.checkpoint_every=2", "train.steps=6"]
TWO = ["parallel.workers=2", "parallel.sp=2"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_corpus(tmp_path_factory.mktemp("checkpoints"))


def run_to_end(config: RunConfig, cache: str) -> list[EventBody]:
    events: list[EventBody] = []
    train(build(config, CPU, Path(cache)), config, events.append)
    return events


def run(ranks: RankPool, config: RunConfig, tmp_path: Path) -> list[EventBody]:
    return ranks.run(run_to_end, config.parallel.workers, config, str(tmp_path / "cache"))[0]


def curve(events: list[EventBody]) -> dict[int, tuple[float, str]]:
    return {e.step: (e.loss, e.samples) for e in events if isinstance(e, StepReport)}


def forget_after(output: Path, step: int) -> None:
    for folder in (*(output / "checkpoints").iterdir(), *(output / "shards").iterdir()):
        if int(folder.name[-8:]) > step:
            shutil.rmtree(folder)


@pytest.mark.parametrize("more", [[], ["optim.kind=adamw8bit"], ["weights.offload_optimizer=cpu"]], ids=str)
def test_a_run_resumed_from_pieces_goes_on_bit_for_bit(
    ranks: RankPool, corpus: str, tmp_path: Path, more: list[str]
) -> None:
    plain = curve(run(ranks, tiny_run(corpus, str(tmp_path / "plain"), *ASYNC[:1], *ASYNC[3:], *TWO, *more), tmp_path))
    config = tiny_run(corpus, str(tmp_path / "run"), *ASYNC, *TWO, *more)
    events = run(ranks, config, tmp_path)
    assert curve(events) == plain
    assert [e.step for e in events if isinstance(e, CheckpointPublished)] == [2, 4, 6]
    assert isinstance(events[-1], RunFinished)
    forget_after(tmp_path / "run", 2)
    assert curve(run(ranks, config, tmp_path)) == {step: plain[step] for step in (3, 4, 5, 6)}


def test_no_rank_writes_more_than_it_holds_and_nothing_is_pickled(ranks: RankPool, corpus: str, tmp_path: Path) -> None:
    run(ranks, tiny_run(corpus, str(tmp_path / "run"), *ASYNC, *TWO), tmp_path)
    pieces = [load_file(f) for f in sorted((tmp_path / "run" / "shards" / "step-00000006").rglob("*.safetensors"))]
    weights = [{n: t for n, t in piece.items() if n.startswith("weights/")} for piece in pieces]
    model = load_causal_lm(tmp_path / "run" / "model", torch.float32)
    assert sum(t.numel() for piece in weights for t in piece.values()) == sum(p.numel() for p in model.parameters())
    assert all(sum(t.numel() for t in piece.values()) > 0 for piece in weights)
    kinds = {f.suffix for f in (tmp_path / "run").rglob("*") if f.is_file()}
    assert kinds <= {".safetensors", ".json", ".yaml", ".txt", ".jinja"}


OTHERS = [["parallel.workers=1"], ["parallel.workers=3", "parallel.sp=1"], ["parallel.workers=4", "parallel.sp=4"]]


@pytest.mark.parametrize("then", OTHERS, ids=str)
def test_pieces_are_read_on_another_number_of_ranks(
    ranks: RankPool, corpus: str, tmp_path: Path, then: list[str]
) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), *ASYNC, *TWO)
    whole = curve(run(ranks, config, tmp_path))
    exported = tmp_path / "exported"
    export_checkpoint(str(tmp_path / "run"), str(exported), "float32")
    want = dict(load_causal_lm(exported, torch.float32).named_parameters())
    got = dict(load_causal_lm(tmp_path / "run" / "model", torch.float32).named_parameters())
    assert all(torch.equal(got[name], weight) for name, weight in want.items())
    forget_after(tmp_path / "run", 4)
    if "parallel.workers=3" in then:
        # Three sequences in a step instead of one: the weights must be the same, what follows is another run.
        steps = ["train.steps=4"]
        run(ranks, tiny_run(corpus, str(tmp_path / "run"), *ASYNC, *then, *steps), tmp_path)
        export_checkpoint(str(tmp_path / "run"), str(tmp_path / "again"), "float32")
        model = dict(load_causal_lm(tmp_path / "run" / "model", torch.float32).named_parameters())
        again = dict(load_causal_lm(tmp_path / "again", torch.float32).named_parameters())
        assert all(torch.equal(again[name], weight) for name, weight in model.items())
        return
    resumed = curve(run(ranks, tiny_run(corpus, str(tmp_path / "run"), *ASYNC, *then), tmp_path))
    assert {s: r[1] for s, r in resumed.items()} == {s: whole[s][1] for s in (5, 6)}
    assert {s: r[0] for s, r in resumed.items()} == pytest.approx({s: whole[s][0] for s in (5, 6)}, rel=1e-6)


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    file.write_bytes(content)


@pytest.mark.parametrize("what", ["shards/{}/rank-00001/shard.safetensors", "checkpoints/{}/shards.json"])
def test_a_tampered_piece_is_passed_over_for_the_checkpoint_before_and_said(
    ranks: RankPool, corpus: str, tmp_path: Path, what: str
) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), *ASYNC, *TWO)
    whole = curve(run(ranks, config, tmp_path))
    damage(tmp_path / "run" / what.format("step-00000006"))
    events = run(ranks, config, tmp_path)
    assert any("checkpoint passed over" in e.text and "sha256" in e.text for e in events if isinstance(e, Note))
    assert curve(events) == {step: whole[step] for step in (5, 6)}


def test_a_piece_of_another_checkpoint_is_not_mixed_in(ranks: RankPool, corpus: str, tmp_path: Path) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), *ASYNC, *TWO)
    whole = curve(run(ranks, config, tmp_path))
    shards = tmp_path / "run" / "shards"
    shutil.rmtree(shards / "step-00000006" / "rank-00001")
    shutil.copytree(shards / "step-00000004" / "rank-00001", shards / "step-00000006" / "rank-00001")
    events = run(ranks, config, tmp_path)
    assert any("belongs to another checkpoint" in e.text for e in events if isinstance(e, Note))
    assert curve(events) == {step: whole[step] for step in (5, 6)}


@pytest.mark.parametrize("background", ["true", "false"])
def test_only_the_newest_checkpoints_and_every_so_many_steps_are_kept(
    ranks: RankPool, corpus: str, tmp_path: Path, background: str
) -> None:
    keep = ["train.checkpoint_every=1", "train.keep_checkpoints=2", "train.keep_every=3", "train.steps=6"]
    config = tiny_run(corpus, str(tmp_path / "run"), *TWO, *keep, f"train.checkpoint_async={background}")
    run(ranks, config, tmp_path)
    assert list_steps(config.output) == [6, 5, 3]
    left = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if not p.name.startswith("."))
    assert left == ["step-00000003", "step-00000005", "step-00000006"]


def test_what_expires_never_includes_the_newest() -> None:
    assert expired([1, 2, 3, 4, 5, 6], keep=2, every=3) == [4, 2, 1]
    assert expired([10, 20, 30], keep=0, every=0) == []
    assert expired([10], keep=1, every=0) == []


def random_numbers(config: RunConfig, cache: str, draw: bool) -> list[float]:
    """Numbers each rank draws after its run ended; `draw`: some are drawn before the last checkpoint."""
    training = build(config, CPU, Path(cache))
    torch.manual_seed(99 if draw else dist.get_rank())
    if draw:
        torch.rand(7 + dist.get_rank())
    train(training, config, lambda event: None)
    return torch.rand(3).tolist()


@pytest.mark.parametrize("background", ["true", "false"])
def test_random_generators_are_restored_on_every_rank(
    ranks: RankPool, corpus: str, tmp_path: Path, background: str
) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), *TWO, "train.steps=1", f"train.checkpoint_async={background}")
    drawn = ranks.run(random_numbers, 2, config, str(tmp_path / "cache"), True)
    assert drawn[0] != drawn[1]
    assert ranks.run(random_numbers, 2, config, str(tmp_path / "cache"), False) == drawn


class AskedToStop(NothingOutside):
    """A launcher that tells one rank, after its third step, that its machine will be taken away."""

    def __init__(self) -> None:
        self.steps = 0

    def notice(self) -> str | None:
        self.steps += 1
        return "the machine goes" if self.steps >= 3 and dist.get_rank() == 1 else None


def run_until_asked(config: RunConfig, cache: str) -> tuple[str | None, list[EventBody]]:
    events: list[EventBody] = []
    return train(build(config, CPU, Path(cache)), config, events.append, AskedToStop()), events


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_notice_on_one_rank_ends_the_run_with_a_checkpoint_of_that_very_step(
    ranks: RankPool, corpus: str, tmp_path: Path, background: str
) -> None:
    steps = [*TWO, "train.steps=6", "model.dtype=float32"]
    whole = curve(run(ranks, tiny_run(corpus, str(tmp_path / "whole"), *steps), tmp_path))
    config = tiny_run(corpus, str(tmp_path / "run"), *steps, f"train.checkpoint_async={background}")
    for uri, events in ranks.run(run_until_asked, 2, config, str(tmp_path / "cache")):
        assert uri is None
        assert events[-1] == RunPreempted(step=3, reason="the machine goes")
    assert list_steps(config.output) == [3]
    assert curve(run(ranks, config, tmp_path)) == {step: whole[step] for step in (4, 5, 6)}


def test_a_checkpoint_that_cannot_be_written_stops_every_rank_at_the_next_boundary(
    ranks: RankPool, corpus: str, tmp_path: Path, small_disk: Path
) -> None:
    config = tiny_run(corpus, str(small_disk / "run"), *TWO, *ASYNC)
    with pytest.raises(RankFailed, match=r"(?i)disk|space"):
        run(ranks, config, tmp_path)
    assert list_steps(config.output) == []


def run_alone(config: RunConfig, cache: Path) -> list[EventBody]:
    """In this process, because the S3 of a test is in its environment."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return run_to_end(config, str(cache))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("background", ["true", "false"])
def test_an_s3_that_fails_for_a_while_delays_a_checkpoint_and_does_not_lose_it(
    corpus: str, s3: S3Bucket, tmp_path: Path, background: str
) -> None:
    config = tiny_run(corpus, f"{s3.uri}/run", "train.steps=2", f"train.checkpoint_async={background}")
    # Each request is tried four times before it counts as failed: the first attempt to publish is lost.
    s3.server.faults.plan("/run/checkpoints", unavailable=5)
    events = run_alone(config, tmp_path / "cache")
    assert [e.step for e in events if isinstance(e, CheckpointPublished)] == [2]
    assert s3.server.faults.seen > 5
    s3.server.faults.plan("/run/checkpoints", broken_bodies=4)
    events = run_alone(config, tmp_path / "again")
    assert any("resumed after step 2" in e.text for e in events if isinstance(e, Note))


def run_through_an_outage(config: RunConfig, cache: Path, s3: S3Bucket, seconds: float) -> list[EventBody]:
    """A run whose S3 answers nothing for so long after its first step."""
    events: list[EventBody] = []

    def tell(body: EventBody) -> None:
        events.append(body)
        if isinstance(body, StepReport) and body.step == 1:
            s3.server.faults.outage(seconds, requests=4)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        train(build(config, CPU, cache), config, tell)
    finally:
        dist.destroy_process_group()
    return events


# Each request is tried for a few seconds by the client itself.
@pytest.mark.long
@pytest.mark.parametrize("seconds", [8, pytest.param(60, marks=pytest.mark.soak)])
@pytest.mark.parametrize("background", ["true", "false"])
def test_an_s3_that_is_gone_for_a_minute_delays_a_run_and_loses_none_of_its_checkpoints(
    corpus: str, s3: S3Bucket, tmp_path: Path, background: str, seconds: float
) -> None:
    more = ["train.steps=3", "train.checkpoint_every=1", f"train.checkpoint_async={background}"]
    undisturbed = curve(run_alone(tiny_run(corpus, str(tmp_path / "run"), *more), tmp_path / "cache"))
    config = tiny_run(corpus, f"{s3.uri}/run", *more)
    events = run_through_an_outage(config, tmp_path / "cache", s3, seconds)
    assert s3.server.faults.refused > 1
    assert s3.server.faults.dropped > 1
    published = [event for event in events if isinstance(event, CheckpointPublished)]
    assert [event.step for event in published] == [1, 2, 3]
    assert published[0].seconds > seconds - 1
    assert curve(events) == undisturbed
    assert list_steps(config.output) == [3, 2, 1]
    for step in (1, 2, 3):
        # Every byte is held against the sha256 of what was to be published.
        fetch_folder(f"{config.output}/checkpoints/step-{step:08d}", tmp_path / "fetched")
    assert (fetch_folder(f"{config.output}/model", tmp_path / "fetched") / "config.json").is_file()


def resized(config: RunConfig, workers: int, *, steps: int) -> RunConfig:
    (size,) = [size for size in legal_sizes(config) if size.workers == workers]
    fewer = at_size(config, size)
    fewer.train.steps = steps
    return fewer


def test_a_run_that_shrinks_and_grows_consumes_the_same_samples_and_learns_the_same(
    ranks: RankPool, corpus: str, tmp_path: Path
) -> None:
    shape = ["parallel.workers=2", "parallel.min_workers=1", "train.accumulation=2", "optim.warmup_steps=0"]
    # The learning rate must not depend on where a part of the run ends.
    flat = ["optim.final_lr_fraction=1", "model.dtype=float32", "train.checkpoint_async=true", "train.steps=6"]
    whole = curve(run(ranks, tiny_run(corpus, str(tmp_path / "whole"), *shape, *flat), tmp_path))
    config = tiny_run(corpus, str(tmp_path / "run"), *shape, *flat)
    parts = [run(ranks, resized(config, n, steps=end), tmp_path) for n, end in ((2, 2), (1, 4), (2, 6))]
    together = {step: report for part in parts for step, report in curve(part).items()}
    assert {s: r[1] for s, r in together.items()} == {s: r[1] for s, r in whole.items()}
    assert {s: r[0] for s, r in together.items()} == pytest.approx({s: r[0] for s, r in whole.items()}, rel=1e-6)


def test_legal_sizes_are_multiples_of_sp_that_share_the_sequences_of_a_step_evenly(corpus: str) -> None:
    shape = ["parallel.workers=8", "parallel.sp=2", "train.accumulation=3"]
    fixed = tiny_run(corpus, "run", *shape)
    assert legal_sizes(fixed) == [Size(8, 3)]
    elastic = tiny_run(corpus, "run", *shape, "parallel.min_workers=2")
    assert legal_sizes(elastic) == [Size(8, 3), Size(6, 4), Size(4, 6), Size(2, 12)]
    at_least_half = tiny_run(corpus, "run", *shape, "parallel.min_workers=4")
    assert legal_sizes(at_least_half)[-1] == Size(4, 6)
