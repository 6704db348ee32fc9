"""The composition room of training: config in, a ready TrainStep out. The only file that knows every part."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from farspan.config.schema import ParallelConfig, RunConfig
from farspan.data.reader import Corpus, Reader, open_corpus
from farspan.errors import ConfigError
from farspan.models.attention import use_farspan_attention
from farspan.models.checkpoint import load_causal_lm, load_tokenizer, make_config, open_config, random_causal_lm
from farspan.models.parts import decoder_layers
from farspan.parallel.mesh import make_mesh
from farspan.parallel.shard import shard_weights
from farspan.parallel.strategy import SequenceParallel, SequenceRanks
from farspan.plan.choose import resolve_strategy
from farspan.plan.facts import model_facts
from farspan.storage.publish import fetch_folder
from farspan.train.checkpoint import TrainState
from farspan.train.loss import PackedLoss
from farspan.train.step import TrainStep
from farspan.verify.certificate import read_certificate, refuse_certificate
from farspan.verify.selfcheck import check_model


@dataclass
class Training:
    """A run, ready to step."""

    step: TrainStep
    tokenizer: PreTrainedTokenizerBase
    state: TrainState
    compute: torch.dtype = torch.float32
    """The type the model computes in."""
    certificate: str | None = None
    """What the doctor found about this model and layout, as JSON; kept beside checkpoints."""


def build(config: RunConfig, device: torch.device, cache: Path | None = None) -> Training:
    """Build the run on this rank of the default process group.

    Every rank makes the whole model on the CPU once and keeps its shard of it.
    """
    cache = cache or Path(tempfile.mkdtemp(prefix="farspan-cache-"))
    corpus = open_corpus(config.data.corpus, cache / "corpus")
    model = _model(config, corpus, cache)
    check_model(model.config)
    dtype = compute_dtype(config.model.dtype, device)
    parallel = named_parallel(config, model.config, dtype.itemsize)
    certificate = required_certificate(config, model.config, parallel)
    use_farspan_attention(model)
    if config.train.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    mesh = make_mesh(device.type, parallel.sp, parallel.ulysses, timeout_s=config.resources.timeout_s)
    loss = PackedLoss(model.to(device), config.train.loss_tile_tokens)
    shard_weights(loss, decoder_layers(model), mesh.all, dtype)
    step = TrainStep(
        loss=loss.train(),
        optimizer=_optimizer(config, loss),
        optim=config.optim,
        num_steps=config.train.steps,
        accumulation=config.train.accumulation,
        mesh=mesh,
        sequence=SequenceParallel(SequenceRanks.of(mesh), parallel.strategy, parallel.layout),
        reader=Reader(corpus, config.data.sequence_tokens, config.seed),
        device=device,
    )
    state = TrainState(0, 0, config.seed, config.data.sequence_tokens, corpus.fingerprint)
    tokenizer = load_tokenizer(corpus.tokenizer_folder)
    return Training(step=step, tokenizer=tokenizer, state=state, compute=dtype, certificate=certificate)


def named_parallel(config: RunConfig, model: PretrainedConfig, compute_bytes: int) -> ParallelConfig:
    """`config.parallel` with its strategy named, as the plan names it."""
    if config.parallel.strategy != "auto":
        return config.parallel
    return resolve_strategy(config.parallel, config.data.sequence_tokens, model_facts(model), compute_bytes).parallel


def required_certificate(config: RunConfig, model: PretrainedConfig, parallel: ParallelConfig) -> str | None:
    """The text of the certificate the run names; none when it names none.

    Raises:
        NotFoundError, CorruptDataError: there is none.
        ConfigError: it does not vouch for this model and layout.
    """
    if config.train.certificate is None:
        return None
    text = read_certificate(config.train.certificate)
    refuse_certificate(config.train.certificate, text, model, parallel)
    return text


def model_config(config: RunConfig, vocab_size: int | None, cache: Path) -> PretrainedConfig:
    """The transformers config of a run; a model made from scratch takes the corpus's vocabulary and length."""
    if config.model.source is not None:
        return open_config(fetch_folder(config.model.source, cache / "model", require_manifest=False))
    fitting = {"max_position_embeddings": config.data.sequence_tokens}
    if vocab_size is not None:
        fitting["vocab_size"] = vocab_size
    return make_config(config.model.architecture, config.model.settings, fitting)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 where the device multiplies it natively, else fp32."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    features = torch.cpu.get_capabilities()
    return torch.bfloat16 if features.get("avx512_bf16") or features.get("amx_bf16") else torch.float32


def _model(config: RunConfig, corpus: Corpus, cache: Path) -> PreTrainedModel:
    weights_dtype = torch.float64 if config.model.dtype == "float64" else torch.float32
    if config.model.source is not None:
        folder = fetch_folder(config.model.source, cache / "model", require_manifest=False)
        model = load_causal_lm(folder, weights_dtype)
        _refuse_other_tokenizer(folder, corpus)
    else:
        model = random_causal_lm(model_config(config, corpus.vocab_size, cache), config.seed).to(weights_dtype)
    _refuse_small_vocabulary(model.config, corpus)
    return model


def _refuse_other_tokenizer(folder: Path, corpus: Corpus) -> None:
    """A model fed the ids of another tokenizer trains without an error, on nonsense."""
    if load_tokenizer(folder).get_vocab() != load_tokenizer(corpus.tokenizer_folder).get_vocab():
        raise ConfigError(
            "data.corpus",
            f"must be built with the tokenizer of model.source ({folder})",
            corpus.uri,
            f"run `farspan data build` with tokenizer={folder}",
        )


def _refuse_small_vocabulary(config: PretrainedConfig, corpus: Corpus) -> None:
    if config.vocab_size < corpus.vocab_size:
        raise ConfigError(
            "model",
            f"must know the corpus's {corpus.vocab_size} tokens",
            f"vocab_size {config.vocab_size}",
            "build the corpus with this model's tokenizer (farspan data build tokenizer=MODEL_FOLDER)",
        )


def _optimizer(config: RunConfig, loss: PackedLoss) -> torch.optim.Optimizer:
    # Weight decay pulls matrices only: decaying norms and biases changes the model's scale for nothing.
    decayed = [p for p in loss.parameters() if p.ndim >= 2]
    others = [p for p in loss.parameters() if p.ndim < 2]
    optim = config.optim
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
    )
