"""Rules between fields, torch-free: what can be refused before a model is opened.

Each rule raises one `ConfigError` that names the nearest legal value.
"""

from __future__ import annotations

import math

from farspan.config.bounds import above, at_least, custom_resources, divides, multiple, one_of, within
from farspan.config.schema import (
    CorpusConfig,
    LoraConfig,
    MemoryConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
)
from farspan.errors import ConfigError

TRAIN_DTYPES = ("auto", "bfloat16", "float32", "float64")
STRATEGIES = ("auto", "ulysses", "ring", "tokenring", "hybrid", "allgather")
LAYOUTS = ("auto", "contiguous", "zigzag", "document_zigzag")
OPTIMIZERS = ("adamw", "adamw8bit")
HYBRID_STRATEGIES = ("auto", "ulysses", "ring", "tokenring", "allgather")
HYBRID_COSTS = ("counted", "measured")
CHUNK_STRATEGIES = ("auto", "ulysses", "allgather", "hybrid")
CHUNKINGS = ("none", "seco", "spaco")
CHUNK_SAMPLINGS = ("independent", "importance", "without_replacement")
WEIGHTS_ENGINES = ("fsdp2", "deepspeed")
OFFLOADS = ("none", "cpu")
ACTIVATION_OFFLOADS = ("none", "cpu", "cxl", "nvme", "auto")
FORMATS = ("text", "chat")
TRAIN_ON = ("assistant", "all")
ON_BAD = ("skip", "fail")


def check_run(config: RunConfig) -> None:
    """Refuse a training config that no model could make legal."""
    parallel, data, train = config.parallel, config.data, config.train
    one_of("model.dtype", config.model.dtype, TRAIN_DTYPES)
    one_of("parallel.strategy", parallel.strategy, STRATEGIES)
    one_of("parallel.layout", parallel.layout, LAYOUTS)
    at_least("parallel.workers", parallel.workers, 1)
    at_least("parallel.sp", parallel.sp, 1)
    within("parallel.min_workers", parallel.min_workers, 0, parallel.workers)
    above("parallel.grow_every_s", parallel.grow_every_s, 0)
    if parallel.sp > 0:
        multiple("parallel.min_workers", parallel.min_workers, "parallel.sp", parallel.sp)
    at_least("parallel.ulysses", parallel.ulysses, 1)
    at_least("train.steps", train.steps, 1)
    at_least("train.accumulation", train.accumulation, 1)
    at_least("train.loss_tile_tokens", train.loss_tile_tokens, 1)
    at_least("train.checkpoint_every", train.checkpoint_every, 0)
    at_least("train.keep_checkpoints", train.keep_checkpoints, 0)
    at_least("train.keep_every", train.keep_every, 0)
    at_least("train.max_restarts", train.max_restarts, 0)
    at_least("train.reprobe_every", train.reprobe_every, 0)
    within("train.z_loss", train.z_loss, 0, 1e3)
    if not 0 <= train.label_smoothing < 1:
        rule = "must be at least 0 and less than 1, the share of each label that is spread over the vocabulary"
        raise ConfigError("train.label_smoothing", rule, train.label_smoothing, "use for example 0.1, or 0 for none")
    at_least("data.sequence_tokens", data.sequence_tokens, 2)
    _check_optim(config.optim)
    _check_memory(config.memory)
    _check_reprobe(config)
    _check_swap(config)
    one_of("plan.choose", config.plan.choose, ("auto", "always", "never"))
    at_least("plan.gpus_per_node", config.plan.gpus_per_node, 1)
    _check_hybrid(config)
    _check_chunks(config)
    _check_weights(config)
    _check_lora(config.lora)
    within("seed", config.seed, 0, 2**63 - 1)
    above("resources.cpus_per_worker", config.resources.cpus_per_worker, 0)
    within("resources.gpus_per_worker", config.resources.gpus_per_worker, 0, math.inf)
    custom_resources("resources.custom", config.resources.custom)
    at_least("resources.timeout_s", config.resources.timeout_s, 1)
    within("resources.peak_tflops", config.resources.peak_tflops, 0, math.inf)
    within("resources.price_per_gpu_hour", config.resources.price_per_gpu_hour, 0, math.inf)
    divides("parallel.sp", parallel.sp, "parallel.workers", parallel.workers)
    divides("parallel.sp", parallel.sp, "data.sequence_tokens", data.sequence_tokens)
    divides("parallel.ulysses", parallel.ulysses, "parallel.sp", parallel.sp)
    if parallel.ulysses > 1 and parallel.strategy != "hybrid":
        raise ConfigError(
            "parallel.ulysses",
            f"is the inner group of strategy=hybrid and must be 1 for {parallel.strategy}",
            parallel.ulysses,
            "use parallel.strategy=hybrid or leave parallel.ulysses out",
        )
    if parallel.strategy != "auto" and not parallel.hdp:
        refuse_ragged_stripes(parallel, data.sequence_tokens)


def _check_hybrid(config: RunConfig) -> None:
    parallel, tokens = config.parallel, config.parallel.rank_tokens
    at_least("parallel.rank_tokens", tokens, 0)
    within("parallel.spill", parallel.spill, 0, 0.95)
    one_of("parallel.hdp_cost", parallel.hdp_cost, HYBRID_COSTS)
    if not parallel.hdp:
        for field, given, unset in (
            ("parallel.rank_tokens", tokens, 0),
            ("parallel.spill", parallel.spill, 0),
            ("parallel.hdp_cost", parallel.hdp_cost, "counted"),
        ):
            if given != unset:
                raise ConfigError(field, "needs parallel.hdp=true", given, "leave it out or use parallel.hdp=true")
        return
    if parallel.spill and config.memory.offload_activations == "none":
        raise ConfigError(
            "parallel.spill",
            "needs a place: memory.offload_activations",
            parallel.spill,
            "use memory.offload_activations=cpu or parallel.spill=0",
        )
    one_of("parallel.strategy", parallel.strategy, HYBRID_STRATEGIES)
    for field, value, legal, why in (
        ("memory.chunk", config.memory.chunk, "none", "a chunk is of one sequence on the ranks of a mesh"),
        ("weights.engine", config.weights.engine, "fsdp2", "DeepSpeed wants as many micro-batches on every process"),
        ("parallel.layout", parallel.layout, "auto", "each document is cut for its own processes"),
        ("train.reprobe_every", config.train.reprobe_every, 0, "a probe computes on the ranks of a mesh"),
        ("train.certificate", config.train.certificate, None, "a certificate is of the ranks of a mesh"),
    ):
        if value != legal:
            way_out = f"leave {field} out" if legal is None else f"use {field}={legal}"
            raise ConfigError(field, f"does not go with parallel.hdp: {why}", value, f"{way_out} or parallel.hdp=false")
    fitting = -(-config.data.sequence_tokens // parallel.workers)
    if 0 < tokens < fitting:
        raise ConfigError(
            "parallel.rank_tokens",
            f"must be at least {fitting}: a document may be as long as data.sequence_tokens "
            f"({config.data.sequence_tokens}), and there are {parallel.workers} processes",
            tokens,
            f"use parallel.rank_tokens={fitting}",
        )


def _check_reprobe(config: RunConfig) -> None:
    if config.train.reprobe_every == 0:
        return
    for field, value, legal in (
        ("weights.engine", config.weights.engine, "fsdp2"),
        ("lora.rank", config.lora.rank, 0),
        ("memory.chunk", config.memory.chunk, "none"),
    ):
        if value != legal:
            raise ConfigError(
                "train.reprobe_every",
                f"compares whole weights and needs {field}={legal}, not {value}",
                config.train.reprobe_every,
                f"use train.reprobe_every=0 or {field}={legal}",
            )


def _check_swap(config: RunConfig) -> None:
    memory, share = config.memory, config.memory.swap_share
    if not isinstance(share, str):
        within("memory.swap_share", share, 0, 1)
    elif share != "auto":
        raise ConfigError("memory.swap_share", "must be a number in 0..1, or auto", share, "use memory.swap_share=auto")
    if share != 0 and not (config.train.recompute and memory.offload_activations != "none"):
        raise ConfigError(
            "memory.swap_share",
            "divides what a layer computes again from what waits elsewhere, and needs both",
            share,
            "use train.recompute=true memory.offload_activations=cpu, or memory.swap_share=0",
        )
    if share != "auto":
        return
    for field, value, legal in (
        ("memory.chunk", memory.chunk, "none"),
        ("parallel.hdp", config.parallel.hdp, False),
        ("weights.engine", config.weights.engine, "fsdp2"),
    ):
        if value != legal:
            raise ConfigError(
                "memory.swap_share",
                f"is measured on one whole sequence before the first step, and auto does not go with {field}={value}",
                share,
                f"use {field}={str(legal).lower()} or a number for memory.swap_share",
            )


def _check_chunks(config: RunConfig) -> None:
    memory, parallel = config.memory, config.parallel
    if memory.chunk == "none":
        return
    multiple("memory.chunk_tokens", memory.chunk_tokens, "parallel.sp", parallel.sp)
    if parallel.sp > 1 and parallel.strategy not in CHUNK_STRATEGIES:
        raise ConfigError(
            "parallel.strategy",
            f"must be one of {', '.join(CHUNK_STRATEGIES)} when memory.chunk is {memory.chunk}",
            parallel.strategy,
            "use parallel.strategy=ulysses or memory.chunk=none",
        )
    if parallel.layout not in ("auto", "contiguous"):
        raise ConfigError(
            "parallel.layout", "must be auto: chunks decide who holds what", parallel.layout, "use parallel.layout=auto"
        )
    if memory.offload_activations == "nvme":
        raise ConfigError(
            "memory.offload_activations",
            f"must be memory that is read in place when memory.chunk is {memory.chunk}: the arena of keys and values",
            memory.offload_activations,
            "use memory.offload_activations=cpu or cxl",
        )
    if memory.chunk == "spaco" and config.weights.engine == "deepspeed":
        raise ConfigError(
            "memory.chunk",
            "must not be spaco with weights.engine=deepspeed, which expects a backward in every step",
            memory.chunk,
            "use memory.chunk=seco or weights.engine=fsdp2",
        )


def _check_weights(config: RunConfig) -> None:
    weights = config.weights
    one_of("weights.engine", weights.engine, WEIGHTS_ENGINES)
    one_of("weights.offload_optimizer", weights.offload_optimizer, OFFLOADS)
    within("weights.zero", weights.zero, 1, 3)
    if config.optim.kind == "adamw8bit":
        for field, value, wrong, way_out in (
            ("weights.engine", weights.engine, "deepspeed", "fsdp2"),
            ("model.dtype", config.model.dtype, "float64", "float32"),
        ):
            if value == wrong:
                raise ConfigError(field, "must be another for optim.kind=adamw8bit", value, f"use {field}={way_out}")
    if weights.engine == "deepspeed" and config.model.dtype == "float64":
        raise ConfigError(
            "model.dtype",
            "must not be wider than the fp32 weights that DeepSpeed keeps",
            config.model.dtype,
            "use model.dtype=float32 or weights.engine=fsdp2",
        )


def _check_lora(lora: LoraConfig) -> None:
    at_least("lora.rank", lora.rank, 0)
    above("lora.alpha", lora.alpha, 0)
    if lora.dropout != 0:
        raise ConfigError(
            "lora.dropout",
            "must be 0: dropped values would depend on the number of processes",
            lora.dropout,
            "use lora.dropout=0",
        )
    if not lora.targets:
        raise ConfigError("lora.targets", "must name at least one layer", [], "use lora.targets=[all-linear]")
    if "all-linear" in lora.targets and len(lora.targets) > 1:
        raise ConfigError(
            "lora.targets", "all-linear stands alone", list(lora.targets), "use lora.targets=[all-linear]"
        )


def _check_optim(optim: OptimConfig) -> None:
    one_of("optim.kind", optim.kind, OPTIMIZERS)
    above("optim.lr", optim.lr, 0)
    above("optim.max_grad_norm", optim.max_grad_norm, 0)
    within("optim.lr", optim.lr, 0, 1e3)
    within("optim.beta1", optim.beta1, 0, 0.999999)
    within("optim.beta2", optim.beta2, 0, 0.999999)
    within("optim.weight_decay", optim.weight_decay, 0, 1e3)
    within("optim.final_lr_fraction", optim.final_lr_fraction, 0, 1)
    at_least("optim.warmup_steps", optim.warmup_steps, 0)


def _check_memory(memory: MemoryConfig) -> None:
    one_of("memory.offload_activations", memory.offload_activations, ACTIVATION_OFFLOADS)
    one_of("memory.chunk", memory.chunk, CHUNKINGS)
    one_of("memory.chunk_sampling", memory.chunk_sampling, CHUNK_SAMPLINGS)
    at_least("memory.mlp_tile_tokens", memory.mlp_tile_tokens, 0)
    at_least("memory.chunk_tokens", memory.chunk_tokens, 1)
    within("memory.chunk_keep", memory.chunk_keep, 0.01, 1)
    within("memory.limit_gib", memory.limit_gib, 0, math.inf)
    _check_sampling(memory)


def _check_sampling(memory: MemoryConfig) -> None:
    if memory.chunk_sampling == "independent":
        return
    if memory.chunk != "spaco":
        raise ConfigError(
            "memory.chunk_sampling",
            f"is of drawn chunks and must be independent when memory.chunk is {memory.chunk}",
            memory.chunk_sampling,
            "use memory.chunk=spaco or leave memory.chunk_sampling out",
        )
    if memory.chunk_keep_labelled:
        raise ConfigError(
            "memory.chunk_sampling",
            "decides about chunks with labels itself, and needs memory.chunk_keep_labelled=false",
            memory.chunk_sampling,
            "use memory.chunk_keep_labelled=false or memory.chunk_sampling=independent",
        )


def check_corpus(config: CorpusConfig) -> None:
    """Refuse a corpus config that cannot be built."""
    if not config.sources:
        raise ConfigError("sources", "must name at least one file or folder", [], "try sources=[python:stdlib]")
    for source in config.sources:
        _check_source(source)
    one_of("format", config.format, FORMATS)
    one_of("train_on", config.train_on, TRAIN_ON)
    one_of("on_bad", config.on_bad, ON_BAD)
    at_least("vocab_size", config.vocab_size, 300)
    at_least("shard_tokens", config.shard_tokens, 1024)
    at_least("min_tokens", config.min_tokens, 2)
    if config.max_documents is not None:
        at_least("max_documents", config.max_documents, 1)
    at_least("upsample.min_tokens", config.upsample.min_tokens, 1)
    _hundredths("upsample.factor", config.upsample.factor)
    for source in config.sources:
        if isinstance(source, dict) and config.upsample.factor != 1:
            _hundredths("sources.weight times upsample.factor", round(source["weight"] * config.upsample.factor, 6))
    _check_shape_of_documents(config)


def _check_source(source: object) -> None:
    if isinstance(source, str):
        return
    if not isinstance(source, dict) or set(source) != {"path", "weight"} or not isinstance(source["path"], str):
        way_out = "write for example sources=[{path: books, weight: 2}]"
        raise ConfigError("sources", "each must be a path or {path: ..., weight: ...}", source, way_out)
    if isinstance(source["weight"], bool) or not isinstance(source["weight"], int | float):
        raise ConfigError("sources.weight", "must be a number", source["weight"], "use sources.weight=1")
    _hundredths("sources.weight", source["weight"])


def _check_shape_of_documents(config: CorpusConfig) -> None:
    if config.split_tokens is not None:
        if config.format == "chat":
            way_out = "leave split_tokens out"
            raise ConfigError("split_tokens", "cuts texts; a conversation is kept whole", config.split_tokens, way_out)
        # The shortest part of a cut document has more than half of split_tokens.
        at_least("split_tokens", config.split_tokens, 2 * config.min_tokens)
    if config.format == "chat" and config.tokenizer is None:
        way_out = "use tokenizer=FOLDER of the model that is tuned"
        raise ConfigError("tokenizer", "must be given with format=chat", None, way_out)
    if config.format == "text" and config.chat_template is not None:
        raise ConfigError("chat_template", "is for format=chat", config.chat_template, "add format=chat")


def _hundredths(field: str, value: float) -> None:
    """Mixtures are exact: after a hundred epochs every document was seen 100 * weight times."""
    within(field, value, 0.01, 1000)
    if abs(value * 100 - round(value * 100)) > 1e-6:
        raise ConfigError(field, "must be a multiple of 0.01", value, f"use {field}={round(value, 2):g}")


def refuse_ragged_stripes(parallel: ParallelConfig, sequence_tokens: int) -> None:
    """A zigzag cuts a sequence into two equal stripes for each rank of its ring; the strategy is named."""
    num_ring = parallel.sp // (parallel.ulysses if parallel.strategy == "hybrid" else 1)
    zigzag = parallel.layout == "zigzag" or (parallel.layout == "auto" and parallel.strategy != "ulysses")
    multiple = math.lcm(2 * num_ring, parallel.sp)
    if zigzag and num_ring > 1 and sequence_tokens % multiple != 0:
        legal = -(-sequence_tokens // multiple) * multiple
        raise ConfigError(
            "data.sequence_tokens",
            f"must be divisible by {multiple} for a zigzag over {num_ring} ranks",
            sequence_tokens,
            f"use data.sequence_tokens={legal} or parallel.layout=document_zigzag",
        )
