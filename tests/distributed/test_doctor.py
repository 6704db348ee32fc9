"""The doctor sees every fault that is put into the pieces it examines."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tests.support.corpus import small_corpus
from tests.support.decoders import decoder_config
from tests.support.ranks import RankFailed, RankPool
from tests.support.runs import tiny_run
from torch import Tensor, nn
from transformers import PreTrainedModel

from farspan.batch import IGNORED_LABEL, PackedBatch, ShardedBatch
from farspan.cli.doctor import show
from farspan.config.load import dump_config
from farspan.config.schema import ParallelConfig, RunConfig
from farspan.errors import ModelError, PlanError
from farspan.parallel.blockwise import Strategy
from farspan.parallel.layout import Layout
from farspan.parallel.strategy import SequenceRanks
from farspan.train.build import build
from farspan.train.loop import train
from farspan.train.loss import PackedLoss
from farspan.verify.certificate import Certificate, certify
from farspan.verify.doctor import examine
from farspan.verify.judge import Check
from farspan.verify.probe import Subject, examine_rank
from farspan.verify.ranks import ask_ranks
from farspan.verify.sharing import Sharing, share

ULYSSES = ParallelConfig(workers=2, sp=2)
ZIGZAG = ParallelConfig(workers=2, sp=2, strategy="ring")


@dataclass(frozen=True)
class FaultySharing:
    """True pieces, of which one may be another."""

    true: Sharing
    relay: Callable[[Layout], Layout] = lambda layout: layout
    reattend: Callable[[Strategy], Strategy] = lambda strategy: strategy
    rebound: Callable[[Sequence[int]], Sequence[int]] = lambda bounds: bounds

    @property
    def ranks(self) -> SequenceRanks:
        return self.true.ranks

    def lay_out(self, num_tokens: int, bounds: tuple[int, ...]) -> Layout:
        return self.relay(self.true.lay_out(num_tokens, bounds))

    def attention(self, layout: Layout, bounds: Sequence[int]) -> Strategy:
        return self.reattend(self.true.attention(getattr(layout, "true", layout), self.rebound(bounds)))


class FaultyLayout(Layout):
    """A true layout seen through a fault of `shard`."""

    def __init__(self, true: Layout, shard: Callable[[ShardedBatch], ShardedBatch]) -> None:
        self.true, self._fault = true, shard
        self.num_tokens, self.num_ranks = true.num_tokens, true.num_ranks

    def ranges_of(self, rank: int) -> tuple[tuple[int, int], ...]:
        return self.true.ranges_of(rank)

    def shard(self, batch: PackedBatch, rank: int) -> ShardedBatch:
        return self._fault(self.true.shard(batch, rank))


def shifted_twice(batch: PackedBatch) -> PackedBatch:
    again_T = torch.cat([batch.labels_T[1:], torch.tensor([IGNORED_LABEL])])
    return dataclasses.replace(batch, labels_T=again_T)


class TimesRanks(nn.Module):
    """A loss that every rank counts as if it were alone."""

    def __init__(self, model: PreTrainedModel, tile_tokens: int) -> None:
        super().__init__()
        self.inner = PackedLoss(model, tile_tokens)

    def forward(self, *args: Any) -> Tensor:
        return self.inner(*args) * torch.distributed.get_world_size()


def merged_documents(parallel: ParallelConfig) -> Sharing:
    return FaultySharing(share(parallel), rebound=lambda bounds: (0, bounds[-1]))


def swapped_stripes(shard: ShardedBatch) -> ShardedBatch:
    """The two stripes of a zigzag shard in the wrong order, while attention believes the right one."""
    half = shard.tokens_T.numel() // 2
    turned = {name: getattr(shard, name).roll(half) for name in ("tokens_T", "labels_T", "positions_T")}
    return dataclasses.replace(shard, **turned)


def wrong_zigzag(parallel: ParallelConfig) -> Sharing:
    return FaultySharing(share(parallel), relay=lambda layout: FaultyLayout(layout, swapped_stripes))


def own_positions(shard: ShardedBatch) -> ShardedBatch:
    return dataclasses.replace(shard, positions_T=torch.arange(shard.tokens_T.numel()))


def restarted_positions(parallel: ParallelConfig) -> Sharing:
    return FaultySharing(share(parallel), relay=lambda layout: FaultyLayout(layout, own_positions))


def without_window(parallel: ParallelConfig) -> Sharing:
    def faulty(true: Strategy) -> Strategy:
        return lambda q, k, v, **rule: true(q, k, v, **{**rule, "window": None})

    return FaultySharing(share(parallel), reattend=faulty)


def without_softcap(parallel: ParallelConfig) -> Sharing:
    def faulty(true: Strategy) -> Strategy:
        return lambda q, k, v, **rule: true(q, k, v, **{**rule, "softcap": None})

    return FaultySharing(share(parallel), reattend=faulty)


def without_chunk(parallel: ParallelConfig) -> Sharing:
    def faulty(true: Strategy) -> Strategy:
        return lambda q, k, v, **rule: true(q, k, v, **{**rule, "chunk": None})

    return FaultySharing(share(parallel), reattend=faulty)


def without_sinks(parallel: ParallelConfig) -> Sharing:
    def faulty(true: Strategy) -> Strategy:
        return lambda q, k, v, **rule: true(q, k, v, **{**rule, "sinks_H": None})

    return FaultySharing(share(parallel), reattend=faulty)


def wrong_key_heads(parallel: ParallelConfig) -> Sharing:
    """Key heads repeated as a b a b where query heads read a a b b."""

    def faulty(true: Strategy) -> Strategy:
        def attend(q: Tensor, k: Tensor, v: Tensor, **rule: Any) -> Tensor:
            copies = q.shape[1] // k.shape[1]
            return true(q, k.repeat(1, copies, 1), v.repeat(1, copies, 1), **rule)

        return attend

    return FaultySharing(share(parallel), reattend=faulty)


def silent_exchange(parallel: ParallelConfig) -> Sharing:
    """Bytes that nobody counted: the formula no longer holds."""
    true = share(parallel)

    def faulty(strategy: Strategy) -> Strategy:
        def attend(q: Tensor, k: Tensor, v: Tensor, **rule: Any) -> Tensor:
            true.ranks.all.swap_rows(torch.zeros(true.ranks.all.num_ranks, 8))
            return strategy(q, k, v, **rule)

        return attend

    return FaultySharing(true, reattend=faulty)


# what is wrong -> (architecture, layout, the piece that is wrong, a check that must fail, a check that must not)
BYTES, ONE = "bytes sent beside the formula", "logits, one document"
FAULTS: dict[str, tuple[str, ParallelConfig, dict[str, Any], str, str]] = {
    "labels shifted twice": ("llama", ULYSSES, {"read": shifted_twice}, "loss, packed documents", ONE),
    "documents merged": (
        "llama", ULYSSES, {"share": merged_documents},
        "positions changed by a token they must not see", ONE,
    ),
    "loss times sp": ("llama", ULYSSES, {"make_loss": TimesRanks}, "loss, one document", "logits, packed documents"),
    "wrong zigzag": ("llama", ZIGZAG, {"share": wrong_zigzag}, ONE, BYTES),
    "window ignored": ("mistral", ULYSSES, {"share": without_window}, ONE, BYTES),
    "soft cap ignored": (
        "gemma2", ULYSSES, {"share": without_softcap}, ONE, BYTES,
    ),
    "chunk ignored": ("llama4_text", ULYSSES, {"share": without_chunk}, ONE, BYTES),
    "sinks ignored": ("gpt_oss", ULYSSES, {"share": without_sinks}, ONE, BYTES),
    "positions restarted per rank": (
        "llama", ULYSSES, {"share": restarted_positions}, ONE, BYTES,
    ),
    "key heads repeated wrongly": (
        "llama", ZIGZAG, {"share": wrong_key_heads},
        ONE, "positions changed by a token they must not see",
    ),
    "bytes beside the formula": (
        "llama", ULYSSES, {"share": silent_exchange}, BYTES, "logits, packed documents",
    ),
}  # fmt: skip


def examined(ranks: RankPool, architecture: str, parallel: ParallelConfig, **pieces: Any) -> Certificate:
    subject = Subject(decoder_config(architecture), parallel, **{"make_loss": PackedLoss, **pieces})
    return examine(subject, lambda s: ranks.run(examine_rank, parallel.sp, s))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_put_into_a_layout_is_found_and_named(ranks: RankPool, fault: str) -> None:
    architecture, parallel, pieces, broken, untouched = FAULTS[fault]
    certificate = examined(ranks, architecture, parallel, **pieces)
    results = {check.name: check.passed for check in certificate.checks}
    assert not certificate.passed
    assert results[broken] is False
    assert results[untouched] is True


@pytest.mark.parametrize("parallel", [ULYSSES, ZIGZAG], ids=["ulysses", "ring"])
def test_the_same_pieces_without_a_fault_pass(ranks: RankPool, parallel: ParallelConfig) -> None:
    assert examined(ranks, "llama", parallel, share=true_pieces).passed


def true_pieces(parallel: ParallelConfig) -> Sharing:
    return FaultySharing(share(parallel), relay=lambda layout: FaultyLayout(layout, lambda shard: shard))


def doctor(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "farspan.cli.main", "doctor", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.long
def test_the_command_proves_a_layout_and_a_run_takes_its_certificate(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("doctor")
    corpus = small_corpus(folder)
    config = tiny_run(corpus, str(folder / "run"), "parallel.workers=2", "parallel.sp=2", "train.steps=1")
    (folder / "run.yaml").write_text(dump_config(config), encoding="utf-8")
    file = str(folder / "certificate.json")
    answer = doctor(str(folder / "run.yaml"), "--json", "--certificate", file)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == json.loads(Path(file).read_text(encoding="utf-8"))
    assert all(check["passed"] for check in json.loads(answer.stdout)["checks"])
    config.train.certificate = file
    ranks.run(train_once, 2, config, str(folder / "cache"))
    carried = folder / "run" / "checkpoints" / "step-00000001" / "farspan_certificate.json"
    assert carried.read_text(encoding="utf-8") == Path(file).read_text(encoding="utf-8")
    config.parallel.strategy = "ring"
    with pytest.raises(RankFailed, match=r"train.certificate: must be of this run's layout"):
        ranks.run(train_once, 2, config, str(folder / "cache"))


def train_once(config: RunConfig, cache: str) -> None:
    train(build(config, torch.device("cpu"), Path(cache)), config, lambda _: None)


@pytest.mark.long
def test_a_model_that_cannot_be_exact_ends_the_command_with_one_sentence() -> None:
    answer = doctor("stablelm")
    assert answer.returncode == 2
    assert answer.stderr.splitlines()[-1].startswith("error: StableLmAttention did not pass farspan_attention on")


def print_failed(path: str) -> None:
    failed = certify(decoder_config("llama"), ULYSSES, (Check("loss", 0.5, 1e-9),))
    show(failed, as_json=False, file=path)


def test_more_processes_than_this_machine_can_prove_with_are_refused() -> None:
    answer = doctor("llama", "parallel.sp=4096", "data.sequence_tokens=8192")
    assert answer.returncode == 2
    assert "parallel.sp: starts that many processes here" in answer.stderr
    assert "got 4096; use parallel.sp=" in answer.stderr


def test_a_failed_check_ends_the_command_with_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended:
        print_failed(str(tmp_path / "certificate.json"))
    assert ended.value.exit_code == 1
    assert "FAIL" in capsys.readouterr().out
    assert json.loads((tmp_path / "certificate.json").read_text(encoding="utf-8"))["passed"] is False


def fall_silent() -> None:
    if torch.distributed.get_rank() == 1:
        threading.Event().wait(60.0)


def raise_on_rank_1() -> None:
    if torch.distributed.get_rank() == 1:
        raise ModelError("rank 1 will not")


@pytest.mark.long
def test_a_rank_that_falls_silent_or_raises_ends_the_question_and_every_process() -> None:
    with pytest.raises(PlanError, match=r"ranks \[.*1\] gave no answer in 12 s"):
        ask_ranks(fall_silent, 2, deadline_s=12.0)
    with pytest.raises(ModelError, match="rank 1 will not"):
        ask_ranks(raise_on_rank_1, 2, deadline_s=100.0)
