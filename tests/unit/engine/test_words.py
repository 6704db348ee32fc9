"""Tokens that alone may be chosen, and words that must not be written, are transformers', wherever one goes on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tests.unit.engine.tiny import engine_config
from tests.unit.engine.worded import worded_model
from transformers.generation.logits_process import NoBadWordsLogitsProcessor, PrefixConstrainedLogitsProcessor

from farspan.engine.draft import Ask
from farspan.engine.engine import Engine
from farspan.engine.graphs import DecodeGraphs
from farspan.engine.history import History, Recall
from farspan.engine.request import FailedEvent, Grammar, SamplingParams
from farspan.engine.sampler import SampleRow
from farspan.engine.steer import steer
from farspan.engine.words import BadWords, WordWatch, spell
from farspan.errors import RequestError

VOCAB = 9
LONG = SamplingParams(max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    return worded_model(tmp_path_factory.mktemp("worded"))


def engine_of(worded, **settings: object) -> Engine:
    model, tokenizer = worded
    return Engine(model, engine_config(**settings), tokenizer=tokenizer)


def logits_of(rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def watching(words: BadWords, answered: list[int]) -> SampleRow:
    return SampleRow(SamplingParams(), 3, len(answered), History(None, None, None, None, WordWatch(words, answered)))


def test_words_are_forbidden_as_by_transformers_after_every_answer_in_whatever_steps_it_came():
    chance = random.Random(5)
    num_forbidden, logits = 0, logits_of()
    for _ in range(60):
        words = [[chance.randrange(VOCAB) for _ in range(chance.randrange(1, 5))] for _ in range(4)]
        theirs, ours = NoBadWordsLogitsProcessor(words), BadWords(words)
        answered = [chance.choice([token for word in words for token in word]) for _ in range(12)]
        stepwise = WordWatch(ours)
        for place in range(len(answered) + 1):
            wanted = theirs(torch.tensor([answered[:place]], dtype=torch.long), logits.clone())
            assert torch.equal(steer(logits, [watching(ours, answered[:place])], frozenset()), wanted)
            forbidden = set((wanted[0] == -torch.inf).nonzero()[:, 0].tolist())
            assert stepwise.forbidden == forbidden
            num_forbidden += len(forbidden)
            stepwise.push(answered[min(place, len(answered) - 1)])
    assert num_forbidden > 500


def test_guesses_end_before_the_token_that_would_be_forbidden():
    words = BadWords([[1], [2, 3], [4, 5, 6]])
    watch = WordWatch(words, [0, 4, 5])
    assert [watch.fits(guess) for guess in ([6], [0, 1], [2, 2, 3], [4, 5, 5, 6], [])] == [0, 1, 2, 4, 0]
    history = Recall(VOCAB, frozenset(), torch.device("cpu")).recall(
        "r", SamplingParams(allowed_token_ids=frozenset({2, 4})), [1], [2]
    )
    assert history is not None
    assert [history.fits(guess) for guess in ([2, 4, 2], [4, 3, 2], [0])] == [3, 1, 0]


def test_allowed_tokens_are_those_of_transformers_and_other_rows_stay_as_they_are():
    logits, allowed = logits_of(2), [1, 4, 8]
    params = SamplingParams(allowed_token_ids=frozenset(allowed))
    history = Recall(VOCAB, frozenset(), torch.device("cpu")).recall("r", params, [1], [])
    ours = steer(logits, [SampleRow(params, 1, 0, history), SampleRow(SamplingParams(), 1, 0)], frozenset())
    theirs = PrefixConstrainedLogitsProcessor(lambda *_: allowed, 1)(torch.tensor([[1]]), logits[:1].clone())
    assert torch.equal(ours[:1], theirs)
    assert torch.equal(ours[1:], logits[1:])


def test_a_word_is_spelled_by_the_tokenizer_with_a_space_before_it_and_without(worded):
    tokenizer = worded[1]
    words = ["self", "  import threading", "\n", " ", "é日"]
    variants = ["self", " self", "import threading", " import threading", "\n", " \n", " ", "é日", " é日"]
    spellings = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in variants]
    assert max(map(len, spellings)) > 4
    ours, theirs = spell(tokenizer, words, len(tokenizer)), BadWords(spellings)
    endings = [spelling[:place] for spelling in spellings for place in range(len(spelling))]
    assert [ours.after(ending) for ending in endings] == [theirs.after(ending) for ending in endings]
    # Tokens that the model has no row for are never written.
    assert spell(tokenizer, ["é"], min(tokenizer("é", add_special_tokens=False)["input_ids"])).after([]) == set()


def plain_answer(worded, params: SamplingParams = LONG) -> list[int]:
    prompt = worded[1]("def run(self):")["input_ids"]
    return list(engine_of(worded).generate([prompt], params)[0].tokens)


def forbidden_words(worded, tokens: list[int]) -> tuple[str, ...]:
    """Texts of one and of two tokens of an answer that are spelled with just these."""
    tokenizer = worded[1]
    runs = [tokens[at : at + size] for size, at in ((1, 4), *((2, at) for at in range(7, 30)))]
    words = [tokenizer.decode(run) for run in runs]
    own = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    return tuple(word for word, run, spelled in zip(words, runs, own, strict=True) if run == spelled)[:5]


class Guessing:
    """Guesses one answer, then another, in turns."""

    def __init__(self, num_prompt: int, answers: list[list[int]]) -> None:
        self.num_prompt, self.answers = num_prompt, answers

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        self.answers = self.answers[::-1]
        return [self.answers[0][len(ask.tokens) - self.num_prompt :][: ask.most] for ask in asks]

    def forget(self, request_id: str) -> None:
        pass


def test_an_answer_without_some_words_goes_on_the_same_after_any_token_beside_others_and_with_guesses(worded):
    tokenizer = worded[1]
    sampled = replace(LONG, temperature=0.9, seed=4, presence_penalty=0.3, repetition_penalty=1.1)
    free = plain_answer(worded, sampled)
    words = forbidden_words(worded, free)
    assert len(words) >= 3
    params, prompt = replace(sampled, bad_words=words), tokenizer("def run(self):")["input_ids"]
    engine = engine_of(worded)
    whole, beside = engine.generate([prompt], params)[0], engine.generate([prompt], sampled)[0]
    assert list(beside.tokens) == free
    tokens = list(whole.tokens)
    assert tokens != free
    spelled = spell(tokenizer, words, len(tokenizer))
    assert all(token not in spelled.after(tokens[:place]) for place, token in enumerate(tokens))
    assert any(token in spelled.after(free[:place]) for place, token in enumerate(free))
    for cut in range(1, len(tokens), 5):
        engine.add("other", prompt, sampled)
        engine.add("r", prompt, params, answered=tokens[:cut])
        rest = [e.token for _ in range(len(tokens)) for e in engine.step() if e.request_id == "r"]
        assert rest == tokens[cut:]
    engine.check_integrity()
    drafter = Guessing(len(prompt), [tokens, free])
    guessing = Engine(worded[0], engine_config(draft_tokens=4), tokenizer=tokenizer, drafter=drafter)
    assert guessing.generate([prompt], params) == [whole]
    assert guessing.drafted.proposed > guessing.drafted.accepted > 10


def test_a_decode_step_that_is_made_as_it_was_recorded_chooses_no_other_tokens(worded, monkeypatch):
    launched: list[int] = []
    own = DecodeGraphs.launch
    monkeypatch.setattr(DecodeGraphs, "launch", lambda self, size: launched.append(size) or own(self, size))
    tokenizer = worded[1]
    model = worded_model_in_float(worded)
    free = plain_answer(worded)
    allowed = frozenset(free[:2]) | frozenset(range(40, 60))
    asked = replace(LONG, allowed_token_ids=allowed, bad_words=(tokenizer.decode([45]),))
    prompt = tokenizer("def run(self):")["input_ids"]
    engine = Engine(model, engine_config(dtype="float32"), tokenizer=tokenizer)
    # Steps of one row are recorded by then.
    engine.generate([prompt], LONG)
    assert launched
    tokens = engine.generate([prompt], asked)[0].tokens
    assert set(tokens) <= allowed - {45}
    assert len(set(tokens)) > 1
    want = Engine(model, engine_config(dtype="float32", graph_rows=0), tokenizer=tokenizer).generate([prompt], asked)
    assert tokens == want[0].tokens


def worded_model_in_float(worded):
    model = type(worded[0])(worded[0].config).float().eval()
    model.load_state_dict(worded[0].state_dict())
    return model


def test_a_form_is_kept_to_by_the_tokens_that_are_allowed_and_without_the_words(worded):
    tokenizer = worded[1]
    digits = [tokenizer(digit, add_special_tokens=False)["input_ids"][0] for digit in "0123456789"]
    prompt = tokenizer("x = ")["input_ids"]
    form = Grammar("regex", "[0-9]{6}")
    params = SamplingParams(max_tokens=9, temperature=2.0, seed=1, grammar=form, allowed_token_ids=frozenset(digits))
    engine = engine_of(worded)
    for seed in range(6):
        asked = replace(params, seed=seed, bad_words=("7", "00"))
        found = tokenizer.decode(list(engine.generate([prompt], asked)[0].tokens))
        assert len(found) == 6
        assert found.isdecimal()
        assert "7" not in found
        assert "00" not in found


def test_where_nothing_is_left_the_request_fails_alone_and_is_told_what_forbids_it(worded):
    tokenizer = worded[1]
    prompt = tokenizer("x = ")["input_ids"]
    engine = engine_of(worded)
    end = frozenset({tokenizer.eos_token_id})
    expected = list(engine.generate([prompt], LONG)[0].tokens)
    engine.add("good", prompt, LONG)
    engine.add("bad", prompt, SamplingParams(min_tokens=3, allowed_token_ids=end))
    engine.add(
        "worse", prompt, SamplingParams(bad_words=("a",), allowed_token_ids=frozenset(tokenizer("a")["input_ids"]))
    )
    events = [event for _ in range(42) for event in engine.step()]
    told = {event.request_id: str(event.error) for event in events if isinstance(event, FailedEvent)}
    assert set(told) == {"bad", "worse"}
    assert told["bad"].endswith("no token is allowed here by min_tokens, allowed_token_ids; leave one of them out")
    assert told["worse"].endswith("no token is allowed here by allowed_token_ids, bad_words; leave one of them out")
    assert [e.token for e in events if e.request_id == "good"] == expected
    assert engine.pool.num_held == 0


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"allowed_token_ids": frozenset({1, 400})}, r"allowed_token_ids must name tokens of .* 0..399, got \[400\]"),
        (
            {"allowed_token_ids": frozenset(range(10_001))},
            "allowed_token_ids must name at most 10000 tokens, got 10001",
        ),
        ({"bad_words": ("a", "")}, r"bad_words must hold words of 1 to 100 characters, got \[''\]"),
        ({"bad_words": ("a" * 101,)}, "bad_words must hold words of 1 to 100 characters"),
        ({"bad_words": ("a",) * 1001}, "bad_words must hold at most 1000 words, got 1001"),
    ],
)
def test_tokens_and_words_that_cannot_be_kept_to_are_refused_by_their_rule(worded, given, reason):
    with pytest.raises(RequestError, match=reason):
        engine_of(worded).add("bad", [1, 2], SamplingParams(**given))


def test_words_need_a_tokenizer_that_has_tokens_for_them(worded):
    with pytest.raises(RequestError, match="bad_words: needs text, and this engine was built without a tokenizer"):
        Engine(worded[0], engine_config()).add("r", [1, 2], SamplingParams(bad_words=("a",)))
    with pytest.raises(ValueError, match=r"bad_words must hold words that this model has tokens for, got 'b'"):
        spell(lambda texts, **_: {"input_ids": [[1] if "a" in text else [] for text in texts]}, ["a", "b"], 5)
