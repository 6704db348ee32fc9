"""An evaluation equals plain transformers on the same tokens, and counts exactly the answers that are right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tests.support.corpus import small_corpus
from tests.support.packed import token_losses_by_transformers

from farspan.batch import IGNORED_LABEL
from farspan.data.reader import Reader, open_corpus
from farspan.errors import ConfigError
from farspan.jobs.evaluate import (
    Evaluation,
    EvaluationPlan,
    answer_all,
    evaluate,
    open_engine,
    token_losses,
)
from farspan.jobs.evaluate_plot import draw_evaluation
from farspan.jobs.evaluate_tasks import TASKS, Filler, Question, is_right, make_question, score
from farspan.models.attention import use_farspan_attention
from farspan.models.checkpoint import load_causal_lm, load_tokenizer, make_config, random_causal_lm, save_causal_lm

SETTINGS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = make_config("llama", {**SETTINGS, "vocab_size": 300, "max_position_embeddings": 1024})
    save_causal_lm(folder, config, random_causal_lm(config, 0).state_dict(), load_tokenizer(Path(corpus) / "tokenizer"))
    return folder


@pytest.fixture(scope="module")
def filler(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Filler:
    opened = open_corpus(corpus, tmp_path_factory.mktemp("cache"))
    reader = Reader(opened, 512, seed=0)
    return Filler(
        load_tokenizer(opened.tokenizer_folder), lambda n: reader.batch(n).tokens_T.tolist(), opened.eos_token_id
    )


def test_the_loss_at_every_length_equals_transformers_on_the_same_tokens(
    model: Path, corpus: str, tmp_path: Path
) -> None:
    plan = EvaluationPlan(model=str(model), corpus=corpus, lengths=(64, 256), sequences=1)
    found = evaluate(plan, lambda _: None)
    network, opened = load_causal_lm(model, torch.float32), open_corpus(corpus, tmp_path)
    assert [entry.length for entry in found.loss] == [64, 256]
    for entry in found.loss:
        losses = []
        for index in range(256 // entry.length):
            batch = Reader(opened, entry.length, plan.seed).batch(index)
            with torch.no_grad():
                losses.append(token_losses_by_transformers(network, batch)[batch.labels_T != IGNORED_LABEL])
        expected = torch.cat(losses).double()
        assert entry.tokens == expected.numel()
        assert entry.loss == pytest.approx(expected.mean().item(), rel=1e-6)
        rows = entry.by_position
        assert sum(loss * tokens for _, _, loss, tokens in rows) / entry.tokens == pytest.approx(entry.loss, rel=1e-9)
        assert all(high < entry.length * 2 for _, high, _, _ in rows)


@torch.no_grad()
def test_a_model_whose_layers_carry_a_state_is_scored_whole(corpus: str, tmp_path: Path) -> None:
    settings = {
        **SETTINGS, "vocab_size": 300, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
    }  # fmt: skip
    network = random_causal_lm(make_config("qwen3_next", settings), 0).eval()
    batch = Reader(open_corpus(corpus, tmp_path), 96, seed=0).batch(1)
    expected = token_losses_by_transformers(network, batch)
    use_farspan_attention(network)
    torch.testing.assert_close(token_losses(network, batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_question_fills_its_length_and_hides_its_answer_at_its_depth(task: str, depth: float, filler: Filler) -> None:
    for sample in range(5):
        question = make_question(task, 700, depth, sample, 3, filler)
        assert len(question.prompt) + question.answer_tokens == 700
        text = filler.decode(question.prompt)
        assert re.search(rf"\b{question.answer}\b", text)
        if task != "variables":
            before = len(filler.encode(text[: text.index(question.answer)]))
            # Facts and their lines move a needle by less than 150 of the 700 tokens.
            assert abs(before - depth * len(question.prompt)) < 150
        assert question == make_question(task, 700, depth, sample, 3, filler)
    others = {make_question(task, 700, depth, 0, seed, filler).prompt for seed in range(5)}
    assert len(others) == 5


def test_the_chain_of_variables_leads_to_the_answer(filler: Filler) -> None:
    for sample in range(20):
        text = filler.decode(make_question("variables", 900, 0.3, sample, 0, filler).prompt)
        values: dict[str, str] = {}
        for name, source in re.findall(r"^(V\d+) = (V?\d+)$", text, flags=re.MULTILINE):
            values[name] = values.get(source, source)
        asked = re.search(r"The value of (V\d+) is$", text)
        assert asked is not None
        assert values[asked.group(1)] == make_question("variables", 900, 0.3, sample, 0, filler).answer


def test_right_answers_are_counted_and_no_others(filler: Filler) -> None:
    def all_right(questions: Sequence[Question]) -> list[list[int]]:
        return [filler.encode(f" {question.answer}.\nand more") for question in questions]

    def first_right(questions: Sequence[Question]) -> list[list[int]]:
        return [filler.encode(f" {q.answer if n == 0 else q.answer + '1'}") for n, q in enumerate(questions)]

    for answer, expected in ((all_right, 3), (first_right, 1)):
        rows = score(TASKS, [600, 700], [0.0, 1.0], 3, 0, filler, answer, lambda _: None)
        assert len(rows) == len(TASKS) * 4
        assert all(row.correct == expected for row in rows)
    assert not is_right(Question((), "12345", 5), "it is 12345")
    assert not is_right(Question((), "12345", 5), "")


def test_answers_equal_greedy_generate_of_transformers(model: Path, filler: Filler) -> None:
    network = load_causal_lm(model, torch.float32)
    questions = [make_question(task, 400, 0.5, 0, 0, filler) for task in TASKS]
    most = max(question.answer_tokens for question in questions)
    expected = []
    for question in questions:
        prompt = torch.tensor([question.prompt])
        answer = network.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=most, do_sample=False, pad_token_id=0
        )
        expected.append(answer[0, prompt.shape[1] :].tolist())
    assert answer_all(open_engine(network, 400 + most), questions) == expected


def test_an_evaluation_is_the_same_twice_and_draws_a_picture(model: Path, corpus: str) -> None:
    tasks = ("loss", *TASKS)
    plan = EvaluationPlan(
        model=str(model), corpus=corpus, tasks=tasks, lengths=(384,), sequences=1, samples=1, depths=(0.5,)
    )
    told: list[str] = []
    one = evaluate(plan, told.append)
    assert one == evaluate(plan, lambda _: None)
    assert len(one.recall) == len(TASKS)
    assert len(told) == 1 + len(one.recall)
    assert draw_evaluation(one).startswith(b"\x89PNG")
    assert draw_evaluation(Evaluation(one.loss, ())).startswith(b"\x89PNG")
    assert draw_evaluation(Evaluation((), one.recall)).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tasks": ("lost",)}, "did you mean 'loss'"),
        ({"lengths": (2048,)}, r"2\.\.1024, the model's context"),
        ({"lengths": (300, 1024)}, r"must divide the longest \(1024\)"),
        ({"tasks": ("variables",), "lengths": (64,)}, "must leave room for the facts of variables"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_sentence(
    changed: dict[str, tuple[str, ...]], message: str, model: Path, corpus: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(EvaluationPlan(model=str(model), corpus=corpus, **changed), lambda _: None)
