"""A draft model that a config names: what is refused, whose memory it has, and that it changes no answer."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.unit.engine.ledger import Clock
from tests.unit.engine.tiny import VOCAB, engine_config, prompts, tiny_model
from tests.unit.serve.tiny_folder import write_tiny_model
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from farspan.config.schema import EngineConfig
from farspan.config.serve_rules import check_engine
from farspan.engine.draft import Ask
from farspan.engine.draft_folder import check_draft
from farspan.engine.draft_model import ModelDrafter
from farspan.engine.engine import Engine
from farspan.engine.request import FailedEvent, SamplingParams
from farspan.engine.terms import Terms
from farspan.errors import CheckpointError, ConfigError, EngineError
from farspan.models.checkpoint import load_causal_lm, load_tokenizer, open_config

GREEDY = SamplingParams(max_tokens=24)
SAMPLED = SamplingParams(max_tokens=24, temperature=0.9, top_p=0.95, seed=5, logit_bias=((7, 1.0),))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_model(made)
    return made


@pytest.fixture(scope="module")
def near(folder: Path) -> Path:
    """The same model with slightly other weights, and a few rows more for tokens that nobody has."""
    made = folder.parent / "near"
    shutil.copytree(folder, made)
    model = noisy(load_causal_lm(folder, torch.float64), 0.01)
    model.resize_token_embeddings(408, mean_resizing=False)
    model.save_pretrained(made)
    return made


def noisy(model: PreTrainedModel, size: float) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def opened(folder: Path, **settings: object) -> Engine:
    model = load_causal_lm(folder, torch.float64)
    return Engine(model, engine_config(**settings), tokenizer=load_tokenizer(folder))


def drafter_of(engine: Engine) -> ModelDrafter:
    drafter = engine._guesses.drafter
    assert isinstance(drafter, ModelDrafter)
    return drafter


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_draft_model_of_a_folder_has_its_part_of_the_memory_and_changes_no_answer(folder, near, params):
    asked = prompts(30, 9, 55)
    plain = opened(folder).generate(asked, params)
    engine = opened(folder, draft_model=str(near), draft_tokens=4)
    assert engine.generate(asked, params) == plain
    assert len({token for answer in plain for token in answer.tokens}) >= 12
    # Some guesses are right and some are not.
    assert engine.drafted.proposed * 0.9 > engine.drafted.accepted > 8
    engine.check_integrity()
    pools = [engine.pool, drafter_of(engine).pool]
    assert [pool.num_held for pool in pools] == [0, 0]
    place_bytes = sum(pool.layout.cost_bytes for pool in pools)
    kv_bytes = engine_config().kv_bytes
    assert kv_bytes - place_bytes < sum(len(pool.storage_PB) * pool.layout.page_bytes for pool in pools) <= kv_bytes
    assert abs(pools[0].num_pages - pools[1].num_pages) <= 1


def test_a_draft_model_that_is_the_model_itself_is_right_in_every_guess(folder):
    engine = opened(folder, draft_model=str(folder), draft_tokens=3)
    engine.generate(prompts(30, 9), SAMPLED)
    assert engine.drafted.proposed == engine.drafted.accepted > 30


def test_a_token_that_only_the_model_has_a_row_for_is_read_by_no_draft_model(folder):
    model = load_causal_lm(folder, torch.float64)
    model.resize_token_embeddings(410, mean_resizing=False)
    asked, params = [[5, 6, 405, 7], [5, 6, 7, 8]], replace(GREEDY, logit_bias=((405, 0.1),))
    plain = Engine(model, engine_config()).generate(asked, params)
    config = engine_config(draft_model=str(folder), draft_tokens=3)
    engine = Engine(model, config, tokenizer=load_tokenizer(folder))
    assert engine.generate(asked, params) == plain
    assert engine.drafted.accepted > 0
    engine.check_integrity()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"draft_tokens": 0}, "engine.draft_model: needs engine.draft_tokens of at least 1, got 'small'; use engine.d"),
        (
            {"draft_tokens": 2, "tensor_parallel": 2},
            "engine.draft_model: does not go with engine.tensor_parallel=2: a draft model is not cut over ranks, got",
        ),
    ],
)
def test_settings_that_do_not_go_with_a_draft_model_are_refused_before_it_is_opened(settings, reason):
    with pytest.raises(ConfigError) as refused:
        check_engine(EngineConfig(draft_model="small", **settings))
    assert str(refused.value).startswith(reason)
    check_engine(EngineConfig(draft_model="small", draft_tokens=1))


def test_a_draft_model_of_other_tokens_is_refused_with_the_first_of_them(folder, tmp_path):
    write_tiny_model(tmp_path / "other", vocab_size=390)
    model, tokenizer = open_config(folder), load_tokenizer(folder)
    with pytest.raises(ConfigError) as refused:
        check_draft(str(tmp_path / "other"), model, tokenizer)
    token = tokenizer.convert_ids_to_tokens(390)
    assert str(refused.value) == (
        f"engine.draft_model: must have the model's tokens, but token 390 is none, and {token!r} in the model, got "
        f"'{tmp_path / 'other'}'; use a smaller model of the same family or leave engine.draft_model out"
    )
    # What was added to a vocabulary has other texts in every second model of a family.
    renamed = load_tokenizer(folder)
    renamed.add_special_tokens({"additional_special_tokens": ["<|more|>"]})
    shutil.copytree(folder, tmp_path / "renamed")
    renamed.save_pretrained(tmp_path / "renamed")
    assert check_draft(str(tmp_path / "renamed"), model, tokenizer) == tmp_path / "renamed"


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        ((), "no such"),
        (("config.json", "tokenizer.json"), "has only pickled weights"),
        (("config.json", "model.safetensors"), "has no tokenizer"),
    ],
)
def test_a_folder_that_is_no_model_in_safetensors_with_its_tokenizer_is_no_draft_model(folder, tmp_path, kept, reason):
    made = tmp_path / "small"
    for name in kept:
        made.mkdir(exist_ok=True)
        shutil.copy(folder / name, made / name)
    if "model.safetensors" not in kept and kept:
        torch.save({}, made / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=reason) as refused:
        check_draft(str(made), open_config(folder), load_tokenizer(folder))
    assert str(refused.value).startswith(str(made))


def test_models_that_keep_a_state_neither_guess_nor_are_guessed_for(folder, tmp_path):
    config = MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
    torch.manual_seed(0)
    recurrent = MambaForCausalLM(config).double().eval()
    shutil.copytree(folder, tmp_path / "mamba")
    recurrent.save_pretrained(tmp_path / "mamba")
    with pytest.raises(ConfigError, match=r"engine.draft_model: must be a model that can take wrong guesses back"):
        opened(folder, draft_model=str(tmp_path / "mamba"), draft_tokens=2)
    with pytest.raises(ConfigError, match=r"engine.draft_model: goes with a model that can take wrong guesses back"):
        opened(tmp_path / "mamba", draft_model=str(folder), draft_tokens=2)
    # Also where no config says so, and only a trial shows that a model is not packed.
    with pytest.raises(ConfigError, match=r"mamba keeps a recurrent state\)"):
        Engine(recurrent, engine_config(draft_model=str(folder), draft_tokens=2))


def test_memory_that_is_too_small_for_both_is_refused_with_what_is_missing_and_enough_is_enough(folder):
    with pytest.raises(ConfigError) as refused:
        opened(folder, kv_bytes=4096, draft_model=str(folder), draft_tokens=2)
    problem = refused.value
    least = int(problem.way_out.split("engine.kv_bytes=")[1].split()[0])
    assert str(problem) == (
        f"engine.kv_bytes: must hold pages of the model and of its draft model, {least - 4096} bytes are missing, got "
        f"4096; use at least engine.kv_bytes={least} or leave engine.draft_model out"
    )
    engine = opened(folder, kv_bytes=least, draft_model=str(folder), draft_tokens=2)
    assert engine.generate([[5, 6, 7]], replace(GREEDY, max_tokens=9)) == opened(folder).generate(
        [[5, 6, 7]], replace(GREEDY, max_tokens=9)
    )
    with pytest.raises(ConfigError, match="1 bytes are missing"):
        opened(folder, kv_bytes=least - 1, draft_model=str(folder), draft_tokens=2)


def test_a_draft_model_is_in_step_with_sequences_that_are_preempted_restored_and_cancelled():
    chance = random.Random(3)
    asked = {f"r{number}": prompts(chance.randrange(3, 40), seed=number)[0] for number in range(12)}
    params = {name: replace(SAMPLED, max_tokens=20, request=number) for number, name in enumerate(asked)}
    plain_engine = Engine(tiny_model(), engine_config(prefix_cache=False))
    plain = {name: plain_engine.generate([asked[name]], params[name])[0].tokens for name in asked}
    page_bytes = plain_engine.pool.layout.page_bytes
    config = engine_config(kv_bytes=34 * page_bytes, draft_tokens=3, offload_bytes=1 << 16, max_batch_tokens=24)
    # The model itself: it is right in every guess while what it has read is what it should have read.
    drafter = ModelDrafter(tiny_model(), replace(config, kv_bytes=26 * page_bytes), VOCAB)
    engine = Engine(tiny_model(), config, drafter=drafter, clock=Clock())
    num_preempted, ends_early, told = 0, set(), {name: list[int]() for name in asked}
    later, computed, run = list(asked), [0], drafter._runner.run
    drafter._runner.run = lambda pieces: computed.append(sum(len(p.tokens) for p in pieces)) or run(pieces)
    while later or engine.has_work:
        if later and chance.random() < 0.7:
            name = later.pop()
            engine.add(name, asked[name], params[name], terms=Terms(priority=chance.randrange(3)))
        for event in engine.step():
            assert not isinstance(event, FailedEvent)
            told[event.request_id].append(event.token)
        alive = [*engine._running, *engine._waiting]
        num_preempted = max(num_preempted, sum(sequence.preemptions for sequence in alive))
        if alive and chance.random() < 0.08:
            gone = chance.choice(alive).request_id
            ends_early.add(gone)
            assert engine.cancel(gone)
        engine.check_integrity()
        assert max(computed) <= 24
    assert num_preempted >= 3
    assert len(ends_early) >= 2
    for name in asked:
        assert told[name] == list(plain[name])[: len(told[name])], name
        assert name in ends_early or len(told[name]) == 20
    assert (engine.pool.num_held, drafter.num_held, len(drafter._readings)) == (0, 0, 0)
    assert engine.drafted.proposed == engine.drafted.accepted > 60


def test_pages_of_a_draft_model_that_nobody_gave_back_are_found_when_the_engine_is_looked_over():
    drafter = ModelDrafter(tiny_model(), engine_config(), VOCAB)
    engine = Engine(tiny_model(), engine_config(draft_tokens=2, prefix_cache=False), drafter=drafter)
    engine.add("r", prompts(9)[0], GREEDY)
    for _ in range(3):
        engine.step()
    assert drafter.num_held > 0
    engine.check_integrity()
    # A request that ends without a word to the drafter.
    forget, drafter.forget = drafter.forget, lambda _: None  # type: ignore[method-assign]
    engine.cancel("r")
    with pytest.raises(EngineError, match=r"held for nobody who is here: page .*the guesses for request r"):
        engine.check_integrity()
    assert len(engine.forgotten(())) == drafter.num_held
    forget("r")
    engine.check_integrity()
    drafter.pool._free.pop()
    with pytest.raises(EngineError, match="KV pages lost or doubly owned"):
        engine.check_integrity()


def test_where_pages_are_scarce_those_that_were_first_go_on_and_nobody_is_read_again_and_again():
    page_bytes = Engine(tiny_model(), engine_config()).pool.layout.page_bytes
    drafter = ModelDrafter(tiny_model(), engine_config(kv_bytes=16 * page_bytes), VOCAB)
    computed, run = [], drafter._runner.run
    drafter._runner.run = lambda pieces: computed.append(sum(len(p.tokens) for p in pieces)) or run(pieces)
    told = dict(zip("abc", prompts(16, 16, 12), strict=True))

    def asked(*names: str, most: int = 2) -> list[int]:
        """How many tokens are guessed of each, which then has one more."""
        found = drafter.propose([Ask(name, told[name], most, GREEDY) for name in names])
        for name in names:
            told[name] = [*told[name], 1]
        drafter.check_integrity()
        return [len(guess) for guess in found]

    # 5, 5 and 4 pages, and one that each of those before may need next.
    assert asked("a", "b", "c") == [2, 2, 2]
    held = drafter.num_held
    assert held == 14
    for _ in range(30):
        found = asked("a", "b", "c")
        assert found[0] == 2, "the first of all was not guessed on"
    # The others gave way, and were not read anew only to give way once more.
    assert found == [2, 0, 0] or found == [2, 2, 0]
    assert sum(computed) < 16 + 16 + 12 + 31 * (2 + 2 + 2) + 20
    # Whoever is not asked for, as one that waits, gives way to the others.
    told["b"] = told["b"][:20]
    drafter.forget("b")
    assert asked("b") == [2]
    assert not drafter._readings["a"].pages
    for name in told:
        drafter.forget(name)
    assert drafter.num_held == 0
    # 13 of 16 pages: the other 3 would be enough for one that comes, but not when the first needs another.
    told["a"], told["b"] = prompts(49, 11)
    assert asked("a") == [2]
    told["a"] = told["a"][:49]
    assert asked("a", "b") == [2, 0]
    drafter.forget("a")
    assert asked("b") == [2]


def test_a_long_prompt_is_read_a_batch_in_an_iteration_while_others_are_guessed_on():
    drafter = ModelDrafter(tiny_model(), engine_config(max_batch_tokens=16), VOCAB)
    short, long = prompts(5, 50)
    first = drafter.propose([Ask("short", short, 3, GREEDY), Ask("long", long, 3, GREEDY)])
    rounds = [first]
    while not rounds[-1][1]:
        rounds.append(drafter.propose([Ask("short", short, 3, GREEDY), Ask("long", long, 3, GREEDY)]))
    # 4 and 12 tokens, then 16, 16 and 5.
    assert len(rounds) == 4
    assert all(guess[0] == first[0] for guess in rounds)
    alone = ModelDrafter(tiny_model(), engine_config(), VOCAB)
    assert rounds[-1] == alone.propose([Ask("short", short, 3, GREEDY), Ask("long", long, 3, GREEDY)])
    # One guess was right and the next was not, or none was, and it was not asked for a while: it goes on from what is
    # true.
    for right, more in ((1, []), (0, []), (3, []), (0, [5, 6, 7]), (1, [5])):
        (guess,) = drafter.propose([Ask("long", long, 3, GREEDY)])
        long = [*long, *guess[:right], (guess[min(right, 2)] + 1) % VOCAB, *more]
        alone.forget("long")
        assert drafter.propose([Ask("long", long, 3, GREEDY)]) == alone.propose([Ask("long", long, 3, GREEDY)])


def test_after_a_forward_that_raised_the_guesses_are_those_of_a_draft_model_that_never_failed(monkeypatch):
    drafter, fresh = (ModelDrafter(tiny_model(), engine_config(max_batch_tokens=16), VOCAB) for _ in range(2))
    told, run = dict(zip("ab", prompts(20, 5), strict=True)), drafter._runner.run
    fails = [False]

    def breaking(pieces):
        logits = run(pieces)
        if fails[0]:
            # What it wrote by then is in the pages.
            raise RuntimeError("out of memory")
        return logits

    monkeypatch.setattr(drafter._runner, "run", breaking)
    # While the prompts are read, at the last token, and with guesses that were right and wrong.
    for turn in range(9):
        asks = [Ask(name, tokens, 3, GREEDY) for name, tokens in told.items()]
        fails[0] = turn % 2 == 0
        if fails[0]:
            with pytest.raises(RuntimeError):
                drafter.propose(asks)
            fails[0] = False
        found, wanted = drafter.propose(asks), fresh.propose(asks)
        assert found == wanted
        drafter.check_integrity()
        told = {
            name: [*told[name], *guess[: turn % 4], (turn * 7) % VOCAB] for name, guess in zip(told, found, strict=True)
        }
    assert all(found)
