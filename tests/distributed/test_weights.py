"""Both weights engines, with and without LoRA, against plain transformers, torch and peft in one process."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.corpus import small_corpus
from tests.support.engines import build_here, whole_gradients
from tests.support.ranks import RankPool
from tests.support.relative import relative_error
from tests.support.runs import tiny_run
from transformers import AutoModelForCausalLM

from farspan.batch import IGNORED_LABEL
from farspan.config.schema import RunConfig
from farspan.data.reader import Reader, open_corpus
from farspan.errors import FarspanError, TrainingError
from farspan.jobs.export import export_checkpoint
from farspan.models.checkpoint import load_tokenizer, random_causal_lm, save_causal_lm
from farspan.parallel.whole import WholeSequence
from farspan.telemetry.events import EventBody, StepReport
from farspan.train.build import model_config
from farspan.train.loop import train
from farspan.train.step import learning_rate
from farspan.train.weights import weight_groups
from farspan.verify.live import HeadWatch

NUM_STEPS = 3


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_corpus(tmp_path_factory.mktemp("weights"))


Trained = tuple[list[float], list[float], dict[str, torch.Tensor]]


def trained_steps(config: RunConfig, cache: str) -> Trained:
    """(losses, gradient norms, whole weights on rank 0) of the first steps, on one rank."""
    step = build_here(config, cache).step
    reports = [step.run(index) for index in range(NUM_STEPS)]
    weights = step.weights.whole_weights(trained_only=False)
    return [r.loss for r in reports], [r.grad_norm for r in reports], weights


def plain_model(config: RunConfig, cache: Path) -> torch.nn.Module:
    corpus = open_corpus(config.data.corpus, cache)
    return random_causal_lm(model_config(config, corpus.vocab_size, cache), config.seed).train()


def plain_steps(
    model: torch.nn.Module, config: RunConfig, cache: Path, *, keep_last: bool = False
) -> tuple[list[float], list[float]]:
    """The same steps in one process that never packs: every document alone, torch's attention, loss, clip, AdamW.

    `keep_last` leaves the last step's gradients as backward made them.
    """
    reader = Reader(open_corpus(config.data.corpus, cache), config.data.sequence_tokens, config.seed)
    num_sequences = config.parallel.workers // config.parallel.sp * config.train.accumulation
    betas = (config.optim.beta1, config.optim.beta2)
    optimizer = torch.optim.AdamW(weight_groups(model, config.optim), lr=config.optim.lr, betas=betas)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        batches = [reader.batch(step * num_sequences + i) for i in range(num_sequences)]
        num_labels = sum(int((b.labels_T != IGNORED_LABEL).sum()) for b in batches)
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            for start, stop in pairwise(batch.bounds):
                tokens = batch.tokens_T[start:stop].unsqueeze(0)
                logits = model(input_ids=tokens, use_cache=False).logits[0]
                total = total + torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="sum")
        (total / num_labels).backward()
        losses.append(total.item() / num_labels)
        if keep_last and step + 1 == NUM_STEPS:
            return losses, norms
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step, config.train.steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses, norms


def zero(stage: int, *more: str) -> list[str]:
    return ["weights.engine=deepspeed", f"weights.zero={stage}", *more]


DP2, DP3, SP2 = ["parallel.workers=2"], ["parallel.workers=3"], ["parallel.workers=2", "parallel.sp=2"]
ENGINES = {
    "fsdp2, sp 2": SP2,
    "fsdp2, dp 2, accumulation 4": [*DP2, "train.accumulation=4"],
    "zero 1, dp 2": [*DP2, *zero(1)],
    "zero 1, sp 2, accumulation 4": [*SP2, *zero(1, "train.accumulation=4")],
    "zero 2, sp 2": [*SP2, *zero(2)],
    "zero 2, dp 3, accumulation 4": [*DP3, *zero(2, "train.accumulation=4")],
    "zero 3, dp 3": [*DP3, *zero(3)],
    "zero 3, sp 2, accumulation 4": [*SP2, *zero(3, "train.accumulation=4")],
    "zero 3, one process": ["parallel.workers=1", *zero(3)],
    "zero 3, dp 2 x ring 2, recompute": [
        *["parallel.workers=4", "parallel.sp=2", "parallel.strategy=ring", "train.recompute=true", *zero(3)]
    ],
    "fsdp2, offload, chunks of 16": [
        *SP2,
        "memory.chunk=seco",
        "memory.chunk_tokens=16",
        "weights.offload_optimizer=cpu",
    ],
    "zero 1, dp 2, chunks of 24, accumulation 2": [
        *[*DP2, *zero(1, "train.accumulation=2"), "memory.chunk=seco", "memory.chunk_tokens=24"]
    ],
    "zero 3, sp 2, chunks of 24, tiled mlp": [
        *[*SP2, *zero(3), "memory.chunk=seco", "memory.chunk_tokens=24", "memory.tiled_mlp=true"]
    ],
    "zero 1, offload": [*SP2, *zero(1, "weights.offload_optimizer=cpu")],
    "zero 2, offload, accumulation 4": [*DP2, *zero(2, "weights.offload_optimizer=cpu", "train.accumulation=4")],
    "zero 3, offload": [*SP2, *zero(3, "weights.offload_optimizer=cpu")],
}


@pytest.mark.parametrize("name", ENGINES)
def test_losses_norms_and_updates_of_three_steps_equal_plain_transformers(
    ranks: RankPool, corpus: str, tmp_path: Path, name: str
) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), "model.dtype=float32", *ENGINES[name])
    model = plain_model(config, tmp_path)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    want_losses, want_norms = plain_steps(model, config, tmp_path)
    answers = ranks.run(trained_steps, config.parallel.workers, config, str(tmp_path / "cache"))
    for losses, norms, _ in answers:
        assert losses == pytest.approx(want_losses, rel=1e-6)
        assert norms == pytest.approx(want_norms, rel=2e-6)
    got = answers[0][2]
    for n, p in model.named_parameters():
        # AdamW's first steps divide a gradient by its own size: one that is nearly zero keeps few true digits.
        assert relative_error(got[f"model.{n}"] - start[n], p - start[n]) < 1e-3, n


def bf16_steps(config: RunConfig, cache: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """(fp32 weights before the first step on rank 0, losses)."""
    step = build_here(config, cache).step
    return step.weights.whole_weights(trained_only=False), [step.run(index).loss for index in range(NUM_STEPS)]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_computes_in_bf16_from_fp32_weights_that_were_never_rounded(
    ranks: RankPool, corpus: str, tmp_path: Path, stage: int
) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), "model.dtype=bfloat16", *SP2)
    peer = tiny_run(corpus, str(tmp_path / "run"), "model.dtype=bfloat16", *SP2, *zero(stage))
    _, want = ranks.run(bf16_steps, 2, config, str(tmp_path / "cache"))[0]
    masters, losses = ranks.run(bf16_steps, 2, peer, str(tmp_path / "cache"))[0]
    for n, p in plain_model(config, tmp_path).named_parameters():
        assert torch.equal(masters[f"model.{n}"], p), n
    assert losses == pytest.approx(want, rel=2e-3)


def broken_gradient(config: RunConfig, cache: str) -> tuple[str, bool]:
    training = build_here(config, cache)
    step = training.step
    step.run(0)
    before = {**step.weights.whole_weights(trained_only=False), **step.weights.whole_states()}
    norm = training.step.loss.model.base_model.norm
    norm.register_full_backward_hook(lambda module, into, out: tuple(g * float("inf") for g in into))
    message = "nothing was raised"
    try:
        step.run(1)
    except TrainingError as problem:
        message = str(problem)
    after = {**step.weights.whole_weights(trained_only=False), **step.weights.whole_states()}
    return message, all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize(
    ("engine", "dtype"),
    [([], "float32"), (zero(1), "bfloat16"), (zero(2), "bfloat16"), (zero(2), "float32"), (zero(3), "float32")],
    ids=["fsdp2", "zero 1", "zero 2", "zero 2 in fp32", "zero 3"],
)
def test_a_gradient_that_is_not_finite_leaves_weights_and_states(
    ranks: RankPool, corpus: str, tmp_path: Path, engine: list[str], dtype: str
) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), f"model.dtype={dtype}", *SP2, *engine)
    for message, unchanged in ranks.run(broken_gradient, 2, config, str(tmp_path / "cache")):
        assert "weights were not changed; lower optim.lr" in message
        assert unchanged


def run_to_end(config: RunConfig, cache: str) -> list[EventBody]:
    events: list[EventBody] = []
    train(build_here(config, cache), config, events.append)
    return events


def losses_of(ranks: RankPool, config: RunConfig, tmp_path: Path) -> dict[int, float]:
    events = ranks.run(run_to_end, config.parallel.workers, config, str(tmp_path / "cache"))[0]
    return {e.step: e.loss for e in events if isinstance(e, StepReport)}


LORA = ["lora.rank=4", "lora.alpha=8"]
HALTED = {
    "zero 1": [*SP2, *zero(1), "model.dtype=bfloat16"],
    "zero 2, offload": [*SP2, *zero(2, "weights.offload_optimizer=cpu"), "model.dtype=float32"],
    "zero 3, parts of unequal size": [*DP3, *zero(3), "model.dtype=bfloat16"],
    "zero 3, lora": [*SP2, *zero(3), *LORA, "model.dtype=float32"],
    "fsdp2, lora": [*SP2, *LORA, "model.dtype=bfloat16"],
}


@pytest.mark.parametrize("name", HALTED)
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    ranks: RankPool, corpus: str, tmp_path: Path, name: str
) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), "train.checkpoint_every=2", *HALTED[name])
    whole = losses_of(ranks, config, tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    # Bit for bit: the same ranks, the same order of arithmetic.
    assert losses_of(ranks, config, tmp_path) == {3: whole[3], 4: whole[4]}


@pytest.mark.parametrize(
    ("first", "second", "lora"),
    [
        ([*SP2, *zero(3)], ["parallel.workers=1"], []),
        (SP2, [*DP2, *SP2, *zero(1)], []),
        ([*SP2, *zero(2)], [*SP2, *zero(3)], LORA),
    ],
    ids=["zero 3 to fsdp2 on one process", "fsdp2 to zero 1", "zero 2 to zero 3, lora"],
)
def test_a_run_goes_on_with_the_other_engine(
    ranks: RankPool, corpus: str, tmp_path: Path, first: list[str], second: list[str], lora: list[str]
) -> None:
    settings = ["model.dtype=float32", "train.checkpoint_every=2", *lora]
    whole = losses_of(ranks, tiny_run(corpus, str(tmp_path / "run"), *settings, *first), tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    resumed = losses_of(ranks, tiny_run(corpus, str(tmp_path / "run"), *settings, *second), tmp_path)
    assert resumed == pytest.approx({3: whole[3], 4: whole[4]}, rel=1e-6)


def lora_model(config: RunConfig, cache: Path) -> torch.nn.Module:
    """The same model wrapped by peft alone, with the same random A."""
    model = plain_model(config, cache)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        settings = {"r": config.lora.rank, "lora_alpha": config.lora.alpha, "target_modules": "all-linear"}
        return peft.get_peft_model(model, peft.LoraConfig(**settings, task_type="CAUSAL_LM"))


def lora_gradients(config: RunConfig, cache: str) -> tuple[list[float], dict[str, torch.Tensor], set[str]]:
    """(losses, every whole gradient of the last step, names of what has optimizer states), on one rank."""
    training = build_here(config, cache)
    losses = [training.step.run(index).loss for index in range(NUM_STEPS - 1)]
    losses.append(training.step.backward()[0].item())
    states = training.step.weights.whole_states()
    return losses, whole_gradients(training), {name.rpartition("/")[0] for name in states}


ADAPTED = {
    "fsdp2, sp 2": [*SP2, "model.dtype=float64"],
    "fsdp2, dp 2 x ring 2, recompute": [
        *["parallel.workers=4", "parallel.sp=2", "parallel.strategy=ring", "train.recompute=true"],
        "model.dtype=float64",
    ],
    "fsdp2, tokenring 2, accumulation 2": [
        *SP2,
        "parallel.strategy=tokenring",
        "train.accumulation=2",
        "model.dtype=float64",
    ],
    "zero 3, sp 2": [*SP2, *zero(3), "model.dtype=float32"],
    "zero 3, allgather 2": [*SP2, *zero(3), "parallel.strategy=allgather", "model.dtype=float32"],
}


@pytest.mark.parametrize("name", ADAPTED)
def test_losses_and_gradients_of_lora_equal_plain_peft(ranks: RankPool, corpus: str, tmp_path: Path, name: str) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), *LORA, *ADAPTED[name])
    exact = config.model.dtype == "float64"
    model = lora_model(config, tmp_path).to(torch.float64 if exact else torch.float32)
    want_losses, _ = plain_steps(model, config, tmp_path, keep_last=True)
    want = {n.removeprefix("base_model.model."): p.grad for n, p in model.named_parameters() if p.requires_grad}
    # B started at zero: only after a step has A a gradient.
    assert all(bool(grad.abs().max() > 0) for grad in want.values())
    answers = ranks.run(lora_gradients, config.parallel.workers, config, str(tmp_path / "cache"))
    for losses, gradients, _ in answers:
        assert losses == pytest.approx(want_losses, rel=1e-12 if exact else 1e-6)
        assert gradients.keys() == want.keys()
        for n, grad in want.items():
            assert relative_error(gradients[n], grad) < (1e-9 if exact else 2e-3), n
    assert answers[0][2] == {f"model.{n}" for n in want}


@pytest.mark.parametrize("engine", [zero(1), zero(2), zero(2, "weights.offload_optimizer=cpu")], ids=str)
def test_losses_and_norms_of_lora_under_zero_equal_plain_peft(
    ranks: RankPool, corpus: str, tmp_path: Path, engine: list[str]
) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), "model.dtype=float32", *LORA, *SP2, *engine)
    want_losses, want_norms = plain_steps(lora_model(config, tmp_path), config, tmp_path)
    for losses, norms, _ in ranks.run(trained_steps, 2, config, str(tmp_path / "cache")):
        assert losses == pytest.approx(want_losses, rel=1e-6)
        assert norms == pytest.approx(want_norms, rel=1e-4)


@pytest.mark.parametrize("engine", [[], zero(1), zero(3)], ids=["fsdp2", "zero 1", "zero 3"])
def test_lora_in_bf16_learns_as_plain_peft_in_fp32(
    ranks: RankPool, corpus: str, tmp_path: Path, engine: list[str]
) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), "model.dtype=bfloat16", "optim.lr=0.01", *LORA, *SP2, *engine)
    want, _ = plain_steps(lora_model(config, tmp_path), config, tmp_path)
    for losses, _, _ in ranks.run(trained_steps, 2, config, str(tmp_path / "cache")):
        assert losses == pytest.approx(want, rel=2e-3)


@pytest.fixture
def base(corpus: str, tmp_path: Path) -> str:
    """A pretrained model's folder, with the corpus's tokenizer."""
    config = tiny_run(corpus, str(tmp_path / "unused"))
    opened = open_corpus(corpus, tmp_path / "base-cache")
    model = random_causal_lm(model_config(config, opened.vocab_size, tmp_path), seed=5)
    tokenizer = load_tokenizer(opened.tokenizer_folder)
    save_causal_lm(tmp_path / "base", model.config, model.state_dict(), tokenizer)
    return str(tmp_path / "base")


def trained_logits(config: RunConfig, cache: str) -> torch.Tensor:
    """Train to the end; then the logits of one more sequence as the training model computes them, on one rank."""
    training = build_here(config, cache)
    train(training, config, lambda event: None)
    step = training.step
    batch = step.reader.batch(0)
    layout = step.sequence.lay_out(batch.num_tokens, batch.bounds)
    shard, whole = layout.shard(batch, step.exchange.rank), WholeSequence(batch.bounds, step.exchange, layout)
    with torch.no_grad(), HeadWatch(step.loss.model) as head:
        step.loss(shard, step.sequence.attention(layout, batch.bounds), torch.tensor(1.0), whole)
    return head.rows()


def document_logits(model: torch.nn.Module, config: RunConfig, cache: Path) -> torch.Tensor:
    batch = Reader(open_corpus(config.data.corpus, cache), config.data.sequence_tokens, config.seed).batch(0)
    documents = [batch.tokens_T[start:stop].unsqueeze(0) for start, stop in pairwise(batch.bounds)]
    with torch.no_grad():
        return torch.cat([model(input_ids=tokens, use_cache=False).logits[0] for tokens in documents])


PUBLISHED = {
    "fsdp2": [*DP2, "model.dtype=float64"],
    "zero 3": [*DP2, *zero(3), "model.dtype=float32"],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_model_and_adapter_compute_what_the_trained_model_computes(
    ranks: RankPool, corpus: str, base: str, tmp_path: Path, name: str
) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), f"model.source={base}", "optim.lr=0.01", *LORA, *PUBLISHED[name])
    got = ranks.run(trained_logits, 2, config, str(tmp_path / "cache"))[0].double()
    small = 1e-12 if config.model.dtype == "float64" else 1e-5
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(bool(t.abs().max() > 0) for t in saved.values()), "an adapter that changes nothing"
    plain = AutoModelForCausalLM.from_pretrained(base).double().eval()
    before = document_logits(plain, config, tmp_path)
    assert relative_error(got, before) > 1e-3
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").double().eval()
    assert relative_error(document_logits(merged, config, tmp_path), got) < small
    adapted = peft.PeftModel.from_pretrained(plain, str(tmp_path / "run" / "adapter")).double().eval()
    assert relative_error(document_logits(adapted, config, tmp_path), got) < small
    assert (
        json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == base
    )
    # A checkpoint holds the adapter, not the model; exported, it is the published model again.
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    assert not (checkpoint / "model.safetensors").exists()
    export_checkpoint(str(tmp_path / "run"), str(tmp_path / "exported"), "float32")
    published, exported = (load_file(tmp_path / f / "model.safetensors") for f in ("run/model", "exported"))
    assert published.keys() == exported.keys()
    assert all(relative_error(exported[n], published[n]) < 1e-6 for n in exported)


def run_refused(config: RunConfig, cache: str) -> str:
    try:
        run_to_end(config, cache)
    except FarspanError as problem:
        return str(problem)
    return "nothing was raised"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (LORA, ["lora.rank=8"], "trained with r=4, this run has 8; restore it in `lora`"),
        (LORA, ["lora.rank=4", "lora.alpha=9"], "trained with lora_alpha=8.0, this run has 9.0"),
        (LORA, [], "the checkpoint holds an adapter, this run trains every weight"),
        ([], LORA, "the checkpoint holds every weight, this run trains an adapter"),
    ],
    ids=["rank", "alpha", "adapter to every weight", "every weight to adapter"],
)
def test_a_checkpoint_of_other_trained_weights_is_refused(
    ranks: RankPool, corpus: str, tmp_path: Path, first: list[str], second: list[str], message: str
) -> None:
    ranks.run(run_to_end, 1, tiny_run(corpus, str(tmp_path / "run"), "train.steps=1", *first), str(tmp_path / "cache"))
    config = tiny_run(corpus, str(tmp_path / "run"), *second)
    assert message in ranks.run(run_refused, 1, config, str(tmp_path / "cache"))[0]


def test_an_adapter_does_not_go_on_beside_another_base(ranks: RankPool, corpus: str, base: str, tmp_path: Path) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), f"model.source={base}", "train.steps=1", *LORA)
    ranks.run(run_to_end, 1, config, str(tmp_path / "cache"))
    weights = load_file(Path(base) / "model.safetensors")
    save_file({n: t * 1.01 for n, t in weights.items()}, Path(base) / "model.safetensors", metadata={"format": "pt"})
    refusal = ranks.run(run_refused, 1, config, str(tmp_path / "cache2"))[0]
    assert f"trained beside other weights than those of {base}; restore them" in refusal
