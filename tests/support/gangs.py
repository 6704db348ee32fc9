"""Engines over ranks of the pool, and a story that any engine can be told: what it answers must be the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from tests.unit.engine.tiny import engine_config, prompts, tiny_model
from transformers import PreTrainedModel

from farspan.config.schema import EngineConfig
from farspan.engine.cut import Share
from farspan.engine.engine import Engine
from farspan.engine.follow import follow
from farspan.engine.gang import Gang
from farspan.engine.request import FailedEvent, SamplingParams

SIZES: dict[str, dict[str, object]] = {
    "llama": {"vocab_size": 98},
    "llama tied": {"vocab_size": 98, "tie_word_embeddings": True},
    "llama of four": {"num_attention_heads": 8, "vocab_size": 100},
    "qwen2": {},
    # Its vocabulary does not divide: every rank has the whole head.
    "qwen3": {"vocab_size": 97},
    "gemma2": {
        "vocab_size": 98,
        "sliding_window": 10,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 8,
        "tie_word_embeddings": False,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def make(name: str) -> PreTrainedModel:
    """The tiny model of a name."""
    return tiny_model(name.split()[0], **SIZES[name])


@dataclass(frozen=True)
class Told:
    """What an engine did with the story."""

    events: tuple[tuple[str, int, str | None, float, int], ...]
    """(request, token, finish, log-probability, prompt tokens found), in the order they came."""
    preemptions: int
    page_bytes: int
    num_pages: int
    weight_bytes: int
    layout: str
    model: str

    def tokens(self, request_id: str) -> list[int]:
        return [token for name, token, *_ in self.events if name == request_id]

    def logprobs(self, request_id: str) -> list[float]:
        return [event[3] for event in self.events if event[0] == request_id]


GREEDY = SamplingParams(max_tokens=14, logprobs=0)
DRAWN = replace(GREEDY, temperature=0.9, top_p=0.95, seed=5)
PLACES = 20


def asked() -> dict[str, list[int]]:
    """A long prompt, two short ones, and one that begins like the long one but ends within a page of it."""
    long, short, drawn = prompts(37, 9, 12)
    return {"long": long, "short": short, "drawn": drawn, "again": [*long[:30], *short[:5]]}


def tell(engine: Engine) -> Told:
    """Chunked prefill beside decoding, a prefix found in whole pages and a part of one, too few pages for all."""
    events, preempted = [], []
    preempt = engine._preempt

    def count(sequence, *, offload):
        preempted.append(sequence.request_id)
        preempt(sequence, offload=offload)

    engine._preempt = count  # type: ignore[method-assign]
    waiting = asked()
    engine.add("short", waiting.pop("short"), GREEDY)
    for steps in range(1000):
        if steps == 2:
            engine.add("long", waiting.pop("long"), GREEDY)
            engine.add("drawn", waiting.pop("drawn"), DRAWN)
        if steps == 8:
            engine.add("again", waiting.pop("again"), GREEDY)
        if not engine.has_work:
            break
        for event in engine.step():
            assert not isinstance(event, FailedEvent), event
            assert event.logprobs is not None
            events.append(
                (event.request_id, event.token, event.finish, event.logprobs.logprob, event.num_found),
            )
    assert not engine.has_work
    engine.check_integrity()
    layout, held = engine.pool.layout, engine.adapters._model
    return Told(
        tuple(events),
        len(preempted),
        layout.page_bytes,
        engine.pool.num_pages,
        sum(weight.nbytes for weight in held.parameters()),
        layout.fingerprint(),
        layout.model,
    )


def config_for(page_bytes: int, num_ranks: int = 1, **settings: object) -> EngineConfig:
    """So many places as the story wants. `page_bytes`: of a page of each group, on one rank."""
    kv_bytes = PLACES * page_bytes
    return engine_config(max_batch_tokens=16, kv_bytes=kv_bytes, tensor_parallel=num_ranks, **settings)


def gang_here(deadline_s: float = 60.0) -> Gang:
    """All ranks of the pool's group, as one."""
    group = dist.new_group(timeout=timedelta(seconds=deadline_s))
    assert group is not None
    return Gang(group, group, deadline_s)


def tell_ranks(name: str, page_bytes: int, settings: dict[str, object]) -> Told | None:
    """On each rank: the story, told to an engine over all of them."""
    gang = gang_here()
    model, config = make(name), config_for(page_bytes, gang.size, **settings)
    share = Share.of(model, gang)
    if not gang.leads:
        follow(model, config, share)
        return None
    engine = Engine(model, config, share=share)
    try:
        return tell(engine)
    finally:
        engine.close()


def assert_same(got: Told, expected: Told, tolerance: float = 1e-9) -> None:
    """The same tokens in the same iterations, log-probabilities within rounding."""
    plain = [(event[:3], event[4]) for event in got.events]
    assert plain == [(event[:3], event[4]) for event in expected.events]
    pairs = zip(got.events, expected.events, strict=True)
    assert max(abs(a[3] - b[3]) for a, b in pairs) <= tolerance
    assert got.preemptions == expected.preemptions


def assert_chosen(
    logits_TV: torch.Tensor, prompt: Sequence[int], tokens: list[int], logprobs: list[float], tolerance: float
) -> None:
    """Greedy tokens and their log-probabilities are those of transformers' own logits over prompt and answer."""
    rows_NV = logits_TV[len(prompt) - 1 : len(prompt) - 1 + len(tokens)]
    assert rows_NV.argmax(-1).tolist() == tokens
    expected = rows_NV.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    assert max(abs(a - b) for a, b in zip(logprobs, expected, strict=True)) <= tolerance
