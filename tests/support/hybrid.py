"""Runs whose documents have ranks of their own, on a corpus of very different lengths, and what one process finds."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tests.support.corpus import REPOSITORY
from tests.support.runs import tiny_run
from tests.support.whole import whole_of

from farspan.batch import IGNORED_LABEL
from farspan.config.schema import CorpusConfig, RunConfig
from farspan.data.corpus import build_corpus
from farspan.data.reader import Reader, open_corpus
from farspan.models.checkpoint import random_causal_lm
from farspan.train.build import build, model_config

CPU = torch.device("cpu")


def long_tailed_corpus(folder: Path, num_documents: int = 60, mean: float = 5.0, spread: float = 1.3) -> str:
    """Documents cut from this repository's sources, most of them short, a few long: log-normal numbers of letters."""
    text = "".join(p.read_text(encoding="utf-8") for p in sorted((REPOSITORY / "platform/farspan/config").glob("*.py")))
    sizes = np.random.Generator(np.random.PCG64(1)).lognormal(mean, spread, num_documents).clip(16, 4000).astype(int)
    (folder / "texts").mkdir()
    for number, size in enumerate(sizes):
        (folder / "texts" / f"{number:03d}.py").write_text(
            text[number * 300 % (len(text) - 4000) :][:size], encoding="utf-8"
        )
    output = str(folder / "corpus")
    build_corpus(CorpusConfig(sources=[str(folder / "texts")], output=output, vocab_size=300), lambda progress: None)
    return output


_NO_TEXT = ["model.settings.bos_token_id=0", "model.settings.eos_token_id=0"]


def hybrid_run(corpus: str, tmp_path: Path, *overrides: str) -> RunConfig:
    """A tiny model of float64 throughout: Llama's norms would round to float32 on their way."""
    settings = ["parallel.hdp=true", "data.sequence_tokens=512", "model.architecture=starcoder2", *_NO_TEXT]
    return tiny_run(corpus, str(tmp_path / "run"), *settings, *overrides)


def hybrid_gradients(config: RunConfig, cache: str, steps: int) -> list[tuple[float, dict[str, torch.Tensor], int]]:
    """(loss, every whole gradient, bytes sent by this rank) of the first steps, whose weights do not change."""
    step, found = build(config, CPU, Path(cache)).step, []
    for _ in range(steps):
        sent = step.exchange.bytes_sent
        loss, _ = step.backward()
        grads = {n.removeprefix("model."): whole_of(p.grad) for n, p in step.loss.named_parameters()}
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
