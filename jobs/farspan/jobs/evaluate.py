"""What a model makes of long contexts, in this process: its loss by position and context length, and its recall.

Shapes: T tokens of a sequence.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from farspan.batch import IGNORED_LABEL, PackedBatch
from farspan.chunked.evaluate import chunked_losses
from farspan.chunked.seco import refuse_unchunkable
from farspan.config.load import nearest
from farspan.config.schema import EngineConfig
from farspan.data.reader import Corpus, Reader, open_corpus
from farspan.engine.engine import Engine
from farspan.engine.path import needed_kv_bytes
from farspan.engine.request import SamplingParams
from farspan.errors import ConfigError, ModelError
from farspan.jobs.evaluate_tasks import TASKS, Filler, Question, Recall, score
from farspan.models.address import fetch_model
from farspan.models.attention import packed_hidden, use_farspan_attention
from farspan.models.checkpoint import load_causal_lm, load_tokenizer, open_config
from farspan.models.parts import trunk_and_head
from farspan.parallel.documents import attend_documents
from farspan.parallel.whole import WholeSequence

_TILE_TOKENS = 1024
_CHUNK_TOKENS = 4096
_FILLER_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """What to measure. `depths` are where facts are hidden, 0 to 1; `samples` questions are asked at each.

    `sequences` of the longest length are scored; shorter lengths score the same tokens, cut more often.
    """

    model: str
    corpus: str
    tasks: tuple[str, ...] = ("loss",)
    lengths: tuple[int, ...] = ()
    """None: the model's context, up to 8192."""
    sequences: int = 4
    samples: int = 4
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    seed: int = 1


@dataclass(frozen=True, slots=True)
class LossAtLength:
    """Mean loss in nats per token; `by_position` holds (first position, last position, mean loss, tokens)."""

    length: int
    loss: float
    perplexity: float
    tokens: int
    by_position: tuple[tuple[int, int, float, int], ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything that was measured."""

    loss: tuple[LossAtLength, ...]
    recall: tuple[Recall, ...]


def evaluate(plan: EvaluationPlan, tell: Callable[[str], None]) -> Evaluation:
    """Measure in fp32; `tell` hears what is done.

    Raises:
        ConfigError: tasks, lengths or a corpus that do not fit the model.
        NotFoundError: no model or corpus there.
    """
    _refuse_unknown_tasks(plan.tasks)
    with tempfile.TemporaryDirectory(prefix="farspan-evaluate-") as scratch:
        folder = fetch_model(plan.model)
        corpus = open_corpus(plan.corpus, Path(scratch) / "corpus")
        lengths = _checked_lengths(plan, folder, corpus)
        losses = _losses(plan, lengths, folder, corpus, tell) if "loss" in plan.tasks else ()
        asked = [task for task in plan.tasks if task != "loss"]
        return Evaluation(losses, _recall(plan, asked, lengths, folder, corpus, tell) if asked else ())


def _refuse_unknown_tasks(tasks: Sequence[str]) -> None:
    known = ["loss", *TASKS]
    for task in tasks:
        if task not in known:
            raise ConfigError("--tasks", f"must be of {', '.join(known)}", task, nearest(task, known))


def _checked_lengths(plan: EvaluationPlan, folder: Path, corpus: Corpus) -> tuple[int, ...]:
    text = open_config(folder).get_text_config(decoder=True)
    if text.vocab_size < corpus.vocab_size:
        way_out = "build it with this model's tokenizer"
        raise ConfigError("--corpus", f"must fit the model's vocabulary of {text.vocab_size}", plan.corpus, way_out)
    most = getattr(text, "max_position_embeddings", None) or 2**31
    lengths = tuple(sorted(set(plan.lengths))) or (min(8192, most),)
    for length in lengths:
        if not 2 <= length <= most:
            way_out = "raise max_position_embeddings in the model's config to measure beyond it"
            raise ConfigError("--lengths", f"must lie in 2..{most}, the model's context", length, way_out)
        if "loss" in plan.tasks and lengths[-1] % length != 0:
            way_out = "use for example 1024,4096,16384"
            rule = f"must divide the longest ({lengths[-1]}), so that the same tokens are scored"
            raise ConfigError("--lengths", rule, length, way_out)
    return lengths


@torch.no_grad()
def _losses(
    plan: EvaluationPlan, lengths: Sequence[int], folder: Path, corpus: Corpus, tell: Callable[[str], None]
) -> tuple[LossAtLength, ...]:
    network = load_causal_lm(folder, torch.float32)
    use_farspan_attention(network)
    rows = []
    for length in lengths:
        reader = Reader(corpus, length, plan.seed)
        losses, positions = [], []
        # The stream of tokens does not depend on where it is cut: every length scores the same text.
        for index in range(plan.sequences * lengths[-1] // length):
            batch = reader.batch(index)
            scored = batch.labels_T != IGNORED_LABEL
            losses.append(token_losses(network, batch)[scored])
            positions.append(batch.positions_T[scored])
        loss_T = torch.cat(losses).double()
        if loss_T.numel() == 0:
            way_out = "use more --sequences or longer --lengths"
            raise ConfigError("--corpus", "must have labels in the sequences that are scored", plan.corpus, way_out)
        rows.append(summarize(length, loss_T, torch.cat(positions)))
        tell(f"loss, {length} tokens: {rows[-1].loss:.4f}")
    return tuple(rows)


def token_losses(network: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """loss_T of a sequence, 0 where a token has no label; by chunks wherever the model can be cut in time."""
    try:
        refuse_unchunkable(network)
    except ModelError:
        return _whole_losses(network, batch)
    chunk = min(_CHUNK_TOKENS, batch.num_tokens)
    return chunked_losses(network, batch, chunk, tile_tokens=_TILE_TOKENS)


def _whole_losses(network: PreTrainedModel, batch: PackedBatch) -> Tensor:
    attention, whole = partial(attend_documents, bounds=batch.bounds), WholeSequence(batch.bounds)
    hidden_TE = packed_hidden(network, batch.tokens_T, batch.positions_T, attention, whole)
    _, head = trunk_and_head(network)
    tiles = zip(hidden_TE.split(_TILE_TOKENS), batch.labels_T.split(_TILE_TOKENS), strict=True)
    loss = partial(torch.nn.functional.cross_entropy, ignore_index=IGNORED_LABEL, reduction="none")
    return torch.cat([loss(head(tile_TE).float(), tile_T) for tile_TE, tile_T in tiles])


def summarize(length: int, loss_T: Tensor, position_T: Tensor) -> LossAtLength:
    """Mean loss, and mean loss over position ranges that double: 0..63, 64..127, 128..255, ..."""
    rows, low, high = [], 0, 63
    while low <= int(position_T.max()):
        inside = (position_T >= low) & (position_T <= high)
        if inside.any():
            rows.append((low, high, loss_T[inside].mean().item(), int(inside.sum())))
        low, high = high + 1, high * 2 + 1
    mean = loss_T.mean().item()
    return LossAtLength(length, mean, math.exp(min(mean, 700.0)), loss_T.numel(), tuple(rows))


def _recall(
    plan: EvaluationPlan,
    tasks: Sequence[str],
    lengths: Sequence[int],
    folder: Path,
    corpus: Corpus,
    tell: Callable[[str], None],
) -> tuple[Recall, ...]:
    network = load_causal_lm(folder, torch.float32)
    reader = Reader(corpus, min(_FILLER_TOKENS, corpus.manifest.tokens), plan.seed)
    filler = Filler(
        load_tokenizer(corpus.tokenizer_folder),
        lambda number: reader.batch(number).tokens_T.tolist(),
        corpus.eos_token_id,
    )
    engine = open_engine(network, lengths[-1])
    return score(tasks, lengths, plan.depths, plan.samples, plan.seed, filler, partial(answer_all, engine), tell)


def open_engine(network: PreTrainedModel, longest: int) -> Engine:
    """An engine with KV pages for two sequences of `longest` tokens."""
    config = EngineConfig(dtype="float32", max_sequences=2)
    # The engine proves itself on two short prompts, which need memory too.
    config.kv_bytes = needed_kv_bytes(network, config, longest, 2)
    return Engine(network, config)


def answer_all(engine: Engine, questions: Sequence[Question]) -> list[list[int]]:
    """Greedy answers."""
    params = SamplingParams(max_tokens=max(question.answer_tokens for question in questions))
    return [list(done.tokens) for done in engine.generate([question.prompt for question in questions], params)]
