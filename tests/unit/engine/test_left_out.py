"""Slots are not positions: sequences of which tokens were left out, and the rest lies in another order, go on as
transformers does where a mask hides those tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from tests.support.double import DoublePrecision
from tests.support.zoo import VOCAB, zoo_model
from tests.unit.engine.first_class import SETTINGS
from tests.unit.engine.tiny import engine_config, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from farspan.engine.path import open_path
from farspan.engine.recorded import record
from farspan.engine.runner import Piece, Runner
from farspan.errors import ModelError
from farspan.kv.pages import PagePool

NUM_PROMPT, NUM_KEPT, NUM_NEW = 40, 23, 12


def tokens_of(seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (NUM_PROMPT + NUM_NEW,), generator=generator).tolist()


def kept_of(seed: int) -> list[int]:
    """Positions that stay, in the order of their slots."""
    kept = random.Random(seed).sample(range(NUM_PROMPT), NUM_KEPT)
    assert kept != sorted(kept)
    return kept


def moved(pool: PagePool, pages: Sequence[int], kept: Sequence[int]) -> list[int]:
    """Pages in which the keys and values of `kept` lie one after the other, with room for what comes."""
    layout, size = pool.layout, pool.layout.page_tokens
    target = pool.alloc(layout.num_pages(len(kept) + NUM_NEW))
    assert target is not None
    for group_number, group in enumerate(layout.groups):
        for slot, position in enumerate(kept):
            here = target[slot // size * layout.num_groups + group_number], slot % size
            there = pages[position // size * layout.num_groups + group_number], position % size
            for layer in group.layers:
                for stored in (pool.keys_PSGD(layer), pool.values_PSGC(layer)):
                    stored[here] = stored[there]
    return target


def hidden_logits(model: PreTrainedModel, tokens: Sequence[int], kept: Sequence[int]) -> Tensor:
    """Logits [T, V] of transformers: tokens after the prompt see of it only what is kept."""
    seen_TT = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    left_out = sorted(set(range(NUM_PROMPT)) - set(kept))
    seen_TT[NUM_PROMPT:, left_out] = False
    mask_11TT = torch.zeros(seen_TT.shape, dtype=torch.float64).masked_fill(~seen_TT, -torch.inf)[None, None]
    with torch.inference_mode():
        return model(torch.tensor([tokens]), attention_mask=mask_11TT, use_cache=False).logits[0]


class Sequences:
    """Two of them, computed up to the end of their prompts, and then with tokens left out."""

    def __init__(self, runner: Runner, pool: PagePool) -> None:
        self.tokens, self.kept = [tokens_of(seed) for seed in (1, 2)], [kept_of(seed) for seed in (1, 2)]
        self.pages: list[list[int]] = []
        for tokens, kept in zip(self.tokens, self.kept, strict=True):
            pages = pool.alloc(pool.layout.num_pages(NUM_PROMPT))
            assert pages is not None
            for low in range(0, NUM_PROMPT, 16):
                runner.run([Piece(tokens[low : min(low + 16, NUM_PROMPT)], low, pages)])
            self.pages.append(moved(pool, pages, kept))
            pool.free(pages)

    def piece(self, which: int, start: int, count: int) -> Piece:
        """The tokens from `start` on after the prompt."""
        begin = NUM_PROMPT + start
        return Piece(
            self.tokens[which][begin : begin + count],
            NUM_KEPT + start,
            self.pages[which],
            num_logits=count,
            left_out=NUM_PROMPT - NUM_KEPT,
        )


def opened(model: PreTrainedModel, dtype: str) -> tuple[Runner, PagePool]:
    path = open_path(model, engine_config(dtype=dtype, max_context_tokens=100))
    assert isinstance(path.runner, Runner)
    return path.runner, path.pool


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox", "deepseek_v3", "qwen3_moe"])
def test_logits_after_tokens_were_left_out_and_the_others_reordered_equal_transformers_with_a_mask(
    architecture,
) -> None:
    with DoublePrecision():
        plain, ours = (zoo_model(architecture, **SETTINGS.get(architecture, {})) for _ in range(2))
        plain.set_attn_implementation("eager")
        runner, pool = opened(ours, "float64")
        both = Sequences(runner, pool)
        # Several tokens at once, then one at a time; the second sequence never beside the first in the same place.
        found = [
            runner.run([both.piece(0, 0, 5), both.piece(1, 0, 1)]),
            *(runner.run([both.piece(1, 1 + step, 1), both.piece(0, 5 + step, 1)]) for step in range(7)),
        ]
        want = [hidden_logits(plain, *each)[NUM_PROMPT:] for each in zip(both.tokens, both.kept, strict=True)]
        whole = hidden_logits(plain, both.tokens[0], range(NUM_PROMPT))[NUM_PROMPT:]
    first = torch.cat([found[0][:5], *(row[1:] for row in found[1:])])
    second = torch.cat([found[0][5:], *(row[:1] for row in found[1:])])
    assert float((first - want[0]).abs().max()) <= 1e-8
    assert float((second - want[1][:8]).abs().max()) <= 1e-8
    # It matters what was left out.
    assert float((whole - want[0]).abs().max()) > 1e-3


def test_steps_made_in_one_launch_equal_those_made_call_by_call() -> None:
    runner, pool = opened(tiny_model().float(), "float32")
    plain = Runner(runner._model, pool, runner.survey)
    steps = Runner(runner._model, pool, runner.survey)
    steps.capture(2, 100, record)
    both = Sequences(plain, pool)
    for step in range(NUM_NEW):
        pieces = [both.piece(which, step, 1) for which in (0, 1)]
        want = plain.run(pieces)
        assert steps.in_one_launch(pieces) is not None
        assert torch.equal(steps.run(pieces), want)


def test_a_layer_that_counts_slots_back_takes_no_sequence_with_tokens_left_out() -> None:
    runner, pool = opened(tiny_model("mistral", sliding_window=8), "float64")
    pages = pool.alloc(pool.layout.num_pages(20))
    assert pages is not None
    runner.run([Piece(list(range(10)), 0, pages)])
    with pytest.raises(ModelError, match="window"):
        runner.run([Piece([1], 10, pages, left_out=3)])
    assert runner.run([Piece([1], 10, pages)]).isfinite().all()
