"""Documents on ranks of their own: exact against one process, silent where a document fits one rank, never stuck."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.corpus import REPOSITORY
from tests.support.ranks import RankPool
from tests.support.relative import relative_error
from tests.support.runs import tiny_run

from farspan.batch import IGNORED_LABEL
from farspan.config.schema import CorpusConfig, RunConfig
from farspan.data.balance import Cost, MicroBatch, Spill
from farspan.data.corpus import build_corpus
from farspan.data.reader import Reader, open_corpus
from farspan.models.checkpoint import make_config, random_causal_lm
from farspan.parallel.exchange import Counter
from farspan.parallel.ranksets import RankSets
from farspan.plan.facts import model_facts
from farspan.plan.hybrid import document_bytes
from farspan.telemetry.events import StepReport
from farspan.train.build import Training, build, model_config
from farspan.train.loop import train

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """60 documents cut from this repository's sources, most of them short, a few long."""
    folder = tmp_path_factory.mktemp("hybrid")
    text = "".join(p.read_text(encoding="utf-8") for p in sorted((REPOSITORY / "platform/farspan/config").glob("*.py")))
    sizes = np.random.Generator(np.random.PCG64(1)).lognormal(5.0, 1.3, 60).clip(16, 4000).astype(int)
    (folder / "texts").mkdir()
    for number, size in enumerate(sizes):
        (folder / "texts" / f"{number:03d}.py").write_text(text[number * 300 :][:size], encoding="utf-8")
    output = str(folder / "corpus")
    build_corpus(CorpusConfig(sources=[str(folder / "texts")], output=output, vocab_size=300), lambda progress: None)
    return output


def hybrid_run(corpus: str, tmp_path: Path, *overrides: str) -> RunConfig:
    """A tiny model of float64 throughout: Llama's norms would round to float32 on their way."""
    settings = ["parallel.hdp=true", "data.sequence_tokens=512", "model.architecture=starcoder2"]
    return tiny_run(corpus, str(tmp_path / "run"), *settings, *overrides)


def hybrid_gradients(config: RunConfig, cache: str, steps: int) -> list[tuple[float, dict[str, torch.Tensor], int]]:
    """(loss, every whole gradient, bytes sent by this rank) of the first steps, whose weights do not change."""
    step, found = build(config, CPU, Path(cache)).step, []
    for _ in range(steps):
        sent = step.exchange.bytes_sent
        loss, _ = step.backward()
        grads = {n.removeprefix("model."): p.grad.full_tensor() for n, p in step.loss.named_parameters()}
        found.append((loss.item(), grads, step.exchange.bytes_sent - sent))
        step.weights.optimizer.zero_grad()  # type: ignore[attr-defined]
        step.cursor += step.mesh.dp * step.accumulation
    return found


def full_batch(config: RunConfig, cache: Path, steps: int) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """The same steps in one process by plain transformers, document by document."""
    corpus = open_corpus(config.data.corpus, cache)
    model = random_causal_lm(model_config(config, corpus.vocab_size, cache), config.seed).double().train()
    reader = Reader(corpus, config.data.sequence_tokens, config.seed)
    num_sequences = config.parallel.workers // config.parallel.sp * config.train.accumulation
    found = []
    for step in range(steps):
        model.zero_grad()
        batches = [reader.batch(i) for i in range(step * num_sequences, (step + 1) * num_sequences)]
        num_labels = sum(int((b.labels_T != IGNORED_LABEL).sum()) for b in batches)
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            for start, stop in pairwise(batch.bounds):
                tokens = batch.tokens_T[start:stop].unsqueeze(0)
                logits = model(input_ids=tokens, use_cache=False).logits[0]
                total = total + torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="sum")
        (total / num_labels).backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((total.item() / num_labels, grads))
    return found


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
