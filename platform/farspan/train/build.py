"""The composition room of training: config in, a ready TrainStep out. The only file that knows every part."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from farspan.activations.tiled import tile_mlps, tile_norms
from farspan.chunked.arena import KvArena
from farspan.chunked.seco import ChunkedStep
from farspan.config.schema import ParallelConfig, RunConfig
from farspan.data.reader import Corpus, open_corpus
from farspan.errors import ConfigError
from farspan.models.address import fetch_model
from farspan.models.attention import use_farspan_attention
from farspan.models.checkpoint import load_causal_lm, load_tokenizer, make_config, open_config, random_causal_lm
from farspan.models.lora import Adapter, add_adapter, base_of
from farspan.models.parts import decoder_layers, token_norms
from farspan.parallel.mesh import Mesh, make_mesh
from farspan.parallel.ranksets import RankSets
from farspan.parallel.strategy import SequenceParallel, SequenceRanks
from farspan.plan.choose import choose_parallel
from farspan.plan.facts import model_facts
from farspan.plan.hybrid import document_cost, rank_tokens, spill_of
from farspan.storage.patience import patiently
from farspan.train.checkpoint import TrainState
from farspan.train.chunks import Chunks
from farspan.train.fsdp2 import Fsdp2Weights
from farspan.train.hdp import HybridStep
from farspan.train.hdp_cost import cost_key, measured_cost
from farspan.train.limit import memory_limit
from farspan.train.loss import PackedLoss
from farspan.train.offload import ArenaMemory, RunOffload, RunTiers
from farspan.train.samples import WitnessedReader
from farspan.train.step import TrainStep
from farspan.train.swap import choose_share
from farspan.train.tiers import open_run_tiers
from farspan.train.useful import useful_work
from farspan.train.weights import WeightsEngine
from farspan.train.zero import ZeroWeights, refuse_without_deepspeed
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
    adapter: Adapter | None = None
    """What is trained instead of the model's own weights."""
    plan: str = ""
    """What runs where, for a reader; kept beside checkpoints."""
    notes: tuple[str, ...] = ()
    """What was decided only now, by measuring; told when the run begins."""


def build(
    config: RunConfig, device: torch.device, cache: Path | None = None, model: PreTrainedModel | None = None
) -> Training:
    """Build the run on this rank of the default process group.

    Every rank makes the whole model on the CPU once and keeps its shard of it; `model` stands in for it.
    """
    if config.weights.engine == "deepspeed":
        refuse_without_deepspeed()
    cache = cache or Path(tempfile.mkdtemp(prefix="farspan-cache-"))
    source, patience_s = config.data.corpus, config.resources.timeout_s / 2
    corpus = patiently(lambda: open_corpus(source, cache / "corpus"), source, patience_s)
    model = model or _model(config, corpus, cache)
    check_model(model.config)
    dtype = _same_everywhere(compute_dtype(config.model.dtype, device))
    parallel = named_parallel(config, model.config, dtype.itemsize)
    certificate = required_certificate(config, model.config, parallel)
    adapter = _adapter(config, model, device)
    use_farspan_attention(model)
    if config.train.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tiled = _tiled(config, model) if config.memory.tiled_mlp else []
    mesh = make_mesh(device.type, parallel.sp, parallel.ulysses, timeout_s=config.resources.timeout_s)
    sequence = SequenceParallel(SequenceRanks.of(mesh), parallel.strategy, parallel.layout)
    with ExitStack() as undo:
        tiers = open_run_tiers(config, model, parallel, device, dtype)
        if tiers is not None:
            undo.callback(tiers.close)
        loss = _loss(config, model.to(device)).train()
        weights = _engine(config, loss, mesh, device, tiled, tiers)
        undo.callback(weights.close)
        step = TrainStep(
            weights=weights,
            optim=config.optim,
            num_steps=config.train.steps,
            accumulation=config.train.accumulation,
            mesh=mesh,
            sequence=sequence,
            reader=WitnessedReader(
                corpus, config.data.sequence_tokens, config.seed, useful_work(config, model.config), mesh.sp
            ),
            device=device,
            hybrid=_hybrid(config, model.config, sequence, device),
            tiers=tiers,
        )
        notes = () if tiers is None else tiers.notes
        notes = (*notes, *_lay_out(config, model, step, tiers), *_measure_balance(config, model, step, dtype))
        # From here on the step closes what was opened.
        undo.pop_all()
    state = TrainState(0, 0, config.seed, config.data.sequence_tokens, corpus.fingerprint, config.optim.kind)
    return Training(
        step=step,
        tokenizer=load_tokenizer(corpus.tokenizer_folder),
        state=state,
        compute=dtype,
        certificate=certificate,
        adapter=adapter,
        notes=notes,
    )


def _lay_out(config: RunConfig, model: PreTrainedModel, step: TrainStep, tiers: RunTiers | None) -> tuple[str, ...]:
    """Give `step` its chunks and what waits in tiers, and say what was decided by measuring."""
    memory = config.memory
    if memory.chunk != "none":
        home = None if tiers is None or memory.offload_activations == "none" else ArenaMemory(tiers)
        arena = KvArena() if home is None else KvArena(home.allocate, free=home.free, allocate_sums=home.allocate_sums)
        chunked = ChunkedStep(model, memory.chunk_tokens, step.sequence, arena)
        step.chunks = Chunks(chunked, memory, config.seed, home)
        return ()
    if tiers is None or memory.offload_activations == "none":
        return ()
    step.offload, notes = RunOffload(tiers, model, step.device), tuple[str, ...]()
    share = memory.swap_share
    if isinstance(share, str):
        # As a step is: what measuring takes is held to the same limit.
        with memory_limit(step.device, memory.limit_gib):
            share, why = choose_share(step, tiers, memory.limit_gib)
        notes = (why,)
    if share > 0:
        step.offload.swap(model, share)
    return notes


def _measure_balance(config: RunConfig, model: PreTrainedModel, step: TrainStep, dtype: torch.dtype) -> tuple[str, ...]:
    """Last, because what waits in a tier takes its time too."""
    if step.hybrid is None or config.parallel.hdp_cost != "measured":
        return ()
    key = cost_key(config, model_facts(model.config), step.hybrid.strategy, dtype)
    step.hybrid.cost, why = measured_cost(config, key, step)
    return (why,)


def named_parallel(config: RunConfig, model: PretrainedConfig, compute_bytes: int) -> ParallelConfig:
    """`config.parallel` with its strategy named, as the plan names it."""
    if config.parallel.strategy != "auto":
        return config.parallel
    return choose_parallel(config, model_facts(model), compute_bytes).parallel


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
        return open_config(fetch_model(config.model.source, cache / "model", weights=False))
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
        folder = fetch_model(config.model.source, patience_s=config.resources.timeout_s / 2)
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


def _adapter(config: RunConfig, model: PreTrainedModel, device: torch.device) -> Adapter | None:
    if config.lora.rank == 0:
        return None
    base = base_of(config.model.source, config.model.architecture, config.seed)
    return add_adapter(model, config.lora, base, config.seed, compute_dtype(config.model.dtype, device))


def _same_everywhere(dtype: torch.dtype) -> torch.dtype:
    """`dtype`, which every rank must have found; collective.

    Raises:
        ConfigError: `auto` means different types on different machines of the run.
    """
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, str(dtype).removeprefix("torch."))
    if len(set(found)) > 1:
        raise ConfigError(
            "model.dtype",
            f"auto means {' and '.join(sorted(set(found)))} on the machines of this run",
            "auto",
            "use model.dtype=float32, or bfloat16 where all multiply it",
        )
    return dtype


def _loss(config: RunConfig, model: PreTrainedModel) -> PackedLoss:
    train = config.train
    return PackedLoss(model, train.loss_tile_tokens, label_smoothing=train.label_smoothing, z_loss=train.z_loss)


def _tiled(config: RunConfig, model: PreTrainedModel) -> list[nn.Module]:
    """Let what treats every token alone run by tiles; the MLPs."""
    width: int = model.config.get_text_config(decoder=True).hidden_size
    tile_tokens = config.memory.mlp_tile_tokens or width
    tile_norms(token_norms(model), tile_tokens)
    return tile_mlps(model, decoder_layers(model), tile_tokens)


def _hybrid(
    config: RunConfig, model: PretrainedConfig, sequence: SequenceParallel, device: torch.device
) -> HybridStep | None:
    if not config.parallel.hdp:
        return None
    sets = RankSets(device, sequence.ranks.all.counter, timeout_s=config.resources.timeout_s)
    facts = model_facts(model)
    return HybridStep(
        sets, sequence.strategy, rank_tokens(config), document_cost(facts), device, spill_of(config, facts)
    )


def _engine(
    config: RunConfig,
    loss: PackedLoss,
    mesh: Mesh,
    device: torch.device,
    tiled: list[nn.Module],
    tiers: RunTiers | None,
) -> WeightsEngine:
    dtype = compute_dtype(config.model.dtype, device)
    if config.weights.engine == "deepspeed":
        return ZeroWeights(loss, mesh, dtype, config.optim, config.weights, tiled)
    layers, offload = decoder_layers(loss.model), config.weights.offload_optimizer
    home = None if tiers is None else tiers.optimizer
    return Fsdp2Weights(loss, layers, mesh.all, dtype, config.optim, offload, home)
