"""What an earlier request computed, and what waited in host memory, is what transformers computes: in every
first-class architecture.
"""

from __future__ import annotations

import pytest
import torch
from tests.support.double import DoublePrecision
from tests.support.zoo import VOCAB
from tests.unit.engine.first_class import PATHS, WITH_STATES, WITHOUT_PAGES, model_of
from tests.unit.engine.oracle import whole_logits
from tests.unit.engine.test_windows import poison_free_pages
from tests.unit.engine.tiny import engine_config

from farspan.engine.engine import Engine
from farspan.engine.request import SamplingParams
from farspan.engine.terms import Terms

NUM_TOKENS = 16
ONE_TOKEN = SamplingParams(max_tokens=1)
FIRST = Terms(priority=1)
KINDS = [kind for kind in PATHS if kind not in WITHOUT_PAGES]


class Watched:
    """An engine that remembers the logits of every piece it computed, and how many tokens those were."""

    def __init__(self, architecture: str, **settings: object) -> None:
        self.model = model_of(architecture)
        self.engine = Engine(self.model, engine_config(max_batch_tokens=16, **settings))
        assert self.engine.path == PATHS[architecture]
        self.num_tokens = 0
        self.logits: list[torch.Tensor] = []
        run = self.engine._runner.run

        def watched(pieces):
            self.num_tokens += sum(len(piece.tokens) for piece in pieces)
            self.logits.append(run(pieces))
            return self.logits[-1]

        self.engine._runner.run = watched  # type: ignore[method-assign]

    def forget(self) -> None:
        self.num_tokens = 0
        self.logits.clear()

    def assert_as_transformers(self, prompt: list[int], answer: list[int]) -> None:
        """The last logits, one row a step, and the tokens chosen of them."""
        wanted_TV = whole_logits(self.model, [*prompt, *answer])[len(prompt) - 1 : -1]
        got_TV = torch.cat(self.logits)[-len(answer) :]
        assert float((got_TV - wanted_TV).abs().max()) <= 1e-8 * float(wanted_TV.abs().max().clamp_min(1))
        assert answer == wanted_TV.argmax(1).tolist()
        assert len(answer) == NUM_TOKENS
        assert len(set(answer)) >= 6, f"a vacuous answer: {answer}"


def prompt_of(length: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def poison(engine: Engine) -> None:
    """Nobody holds anything: whoever reads what is there gives NaN."""
    poison_free_pages(engine)
    if engine.states is not None:
        assert engine.states.num_free == engine.states.num_slots
        engine.states.storage_SB.view(torch.float64).fill_(torch.nan)


@pytest.mark.parametrize("architecture", KINDS)
def test_logits_after_a_beginning_that_was_found_equal_those_of_transformers(architecture):
    params = SamplingParams(max_tokens=NUM_TOKENS)
    with DoublePrecision():
        watched = Watched(architecture)
        first, second = prompt_of(43, seed=1), prompt_of(40, seed=4)
        # Within a page.
        second = first[:21] + second[21:]
        assert second[21] != first[21]
        watched.engine.generate([first], params)
        watched.forget()
        answer = list(watched.engine.generate([second], params)[0].tokens)
        watched.assert_as_transformers(second, answer)
        # A state is in no page: where there is one, nothing is found.
        computed = len(second) - (0 if architecture in WITH_STATES else 21)
        assert watched.num_tokens == computed + NUM_TOKENS - 1
        watched.engine.check_integrity()


@pytest.mark.parametrize("architecture", KINDS)
def test_logits_after_waiting_in_host_memory_equal_those_of_transformers_and_nothing_is_computed_again(architecture):
    with DoublePrecision():
        watched = Watched(architecture, prefix_cache=False, offload_bytes=1024 * 1024)
        engine, prompt = watched.engine, prompt_of(23, seed=8)
        engine.add("r", prompt, SamplingParams(max_tokens=NUM_TOKENS))
        answer: list[int] = []
        others = computed_for_others = 0
        while engine.has_work:
            answer += [event.token for event in engine.step()]
            if len(answer) in (1, 9) and engine._running:
                (sequence,) = engine._running
                engine._preempt(sequence, offload=True)
                assert sequence.kept is not None
                assert engine.pool.num_held == 0
                poison(engine)
                # Whoever comes in between gets the very pages, and the state; its prompt fills two iterations.
                mine, num_mine = list(watched.logits), watched.num_tokens
                engine.add(f"between {others}", prompt_of(32, seed=20 + others), ONE_TOKEN, terms=FIRST)
                others += 1
                while any(s.request_id != "r" for s in (*engine._running, *engine._waiting)):
                    assert all(event.request_id != "r" for event in engine.step()), "it waits"
                computed_for_others += watched.num_tokens - num_mine
                watched.logits = mine
        assert others == 2
        watched.assert_as_transformers(prompt, answer)
        assert watched.num_tokens - computed_for_others == len(prompt) + NUM_TOKENS - 1
        engine.check_integrity()
        assert engine.pool.num_held == 0
        assert engine._holdings._offload._tier.stats().used_bytes == 0  # type: ignore[union-attr]
