"""What a user can set: one dataclass per file a user writes.

Torch-free. Every field has a default that works on a laptop, or none (`MISSING`) when no default can be right.
Sizes are in tokens or bytes as their names say; times in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

# So much later than the ingress, which tells its clients what happened, the proxy gives a request up.
_PROXY_LATER_S = 5.0


@dataclass(kw_only=True)
class UpsampleConfig:
    """Long documents more often: what a model needs to learn a longer context."""

    min_tokens: int = 32768
    """Documents of at least this many tokens are the long ones."""
    factor: float = 1.0
    """How many times an epoch holds each of them; 1: as every other document."""


@dataclass(kw_only=True)
class CorpusConfig:
    """`farspan data build`: text or conversations in, a tokenized corpus of Arrow shards out."""

    sources: list[Any] = MISSING
    """Files or folders, local or s3://: each a path, or {path: ..., weight: ...}, where an epoch holds the documents of
    that source `weight` times. `python:stdlib` names the source files of this machine's Python."""
    output: str = MISSING
    """Folder the corpus is published to, local or s3://."""
    pattern: str = "*.py"
    """Which files of a folder are read. What a file is says its name: .jsonl, .ndjson and .parquet hold records, any
    other is one text; .gz and .zst are unpacked."""
    format: str = "text"
    """text, or chat: conversations of JSONL and Parquet records, written by the tokenizer's chat template."""
    text_field: str = "text"
    """format=text: the field of a record that holds its text."""
    messages_field: str = "messages"
    """format=chat: the field of a record that holds its messages, each with a role and a content."""
    chat_template: str | None = None
    """format=chat: file with a Jinja chat template, local or s3://; none: the tokenizer's own."""
    train_on: str = "assistant"
    """format=chat: assistant (labels only where the assistant speaks), or all."""
    on_bad: str = "skip"
    """A record that cannot be read: skip (it is counted and named in the manifest), or fail."""
    tokenizer: str | None = None
    """Hugging Face tokenizer folder; none: train a byte-level BPE on the sources."""
    vocab_size: int = 8192
    """Entries of a tokenizer trained here."""
    shard_tokens: int = 2_000_000
    """A shard is closed once it holds this many tokens."""
    max_documents: int | None = None
    """Read only this many documents (in path order); none: all."""
    min_tokens: int = 2
    """Shorter documents teach nothing: they are counted and reported, not written."""
    split_tokens: int | None = None
    """Longer documents are cut into the fewest equal parts of at most this many tokens; none: kept whole."""
    upsample: UpsampleConfig = field(default_factory=UpsampleConfig)
    """Mixture by length."""


@dataclass(kw_only=True)
class ModelConfig:
    """Where the model comes from: a Hugging Face folder, or an architecture with random weights."""

    source: str | None = None
    """Hugging Face folder (config, safetensors), local or s3://. None: random weights from `architecture`."""
    architecture: str = "llama"
    """transformers' model_type when there is no `source`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of the transformers config of that architecture (hidden_size, num_hidden_layers, ...)."""
    dtype: str = "auto"
    """Compute type: auto (bf16 where the device multiplies it natively, else fp32), bfloat16, float32, float64."""


@dataclass(kw_only=True)
class DataConfig:
    """What a run reads."""

    corpus: str = MISSING
    """Folder written by `farspan data build`, local or s3://."""
    sequence_tokens: int = 8192
    """Tokens of one packed sequence."""


@dataclass(kw_only=True)
class ParallelConfig:
    """How many processes, and what they split."""

    workers: int = 1
    """Training processes, one device each."""
    min_workers: int = 0
    """With fewer free devices than `workers` the run starts, or goes on, with any legal number down to this one, on the
    same sequences in each step; 0: it waits for all of them."""
    grow_every_s: float = 60.0
    """Seconds between looks for room for more processes while fewer than `workers` train."""
    sp: int = 1
    """Processes that share one sequence. workers / sp sequences are computed side by side."""
    strategy: str = "ulysses"
    """How processes of one sequence exchange attention: ulysses, ring, tokenring, hybrid, allgather, or auto (chosen
    by the model's heads before anything starts; `farspan plan` says which and why)."""
    ulysses: int = 1
    """strategy=hybrid: neighbouring processes that exchange heads; sp / ulysses such groups form a ring."""
    layout: str = "auto"
    """Tokens of a process: contiguous, zigzag, document_zigzag, or auto (contiguous for ulysses, else zigzag)."""
    hdp: bool = False
    """Hybrid data parallelism: every document of a step goes to as many processes as its length needs, short ones to
    one, so that all processes end together. sp then only says how many sequences a step has."""
    rank_tokens: int = 0
    """hdp: tokens of a micro-batch that one process holds; 0: data.sequence_tokens / sp."""
    hdp_cost: str = "counted"
    """hdp: by what processes are balanced: counted (operations, by the model's config), or measured (seconds of this
    model on these processes, taken before the first step and kept in <output>/hdp_cost.json for every restart)."""
    spill: float = 0.0
    """hdp: share of what a long document keeps that may wait in memory.offload_activations, so that it needs fewer
    processes; 0: none, and everything waits there if it is set."""


@dataclass(kw_only=True)
class WeightsConfig:
    """How weights, gradients and AdamW's states are cut over the processes."""

    engine: str = "fsdp2"
    """fsdp2 (torch's own), or deepspeed (ZeRO; needs the extra `deepspeed`)."""
    zero: int = 3
    """engine=deepspeed: 1 cuts AdamW's states, 2 gradients too, 3 weights too."""
    offload_optimizer: str = "none"
    """none, or cpu to keep AdamW's states and the fp32 weights in host memory: local DRAM, or where memory.tiers gives
    too little of it, the CXL memory they describe."""


@dataclass(kw_only=True)
class LoraConfig:
    """Train two small matrices beside each chosen one instead of the model's own weights."""

    rank: int = 0
    """Inner size of the two matrices; 0: no LoRA, every weight is trained."""
    alpha: float = 16.0
    """Their product is scaled by alpha / rank."""
    dropout: float = 0.0
    """Must be 0: which values are dropped would depend on the number of processes."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of linear layers (q_proj, ...), or all-linear: every one but the head."""


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW and its schedule: linear warm-up, then cosine down to `final_lr_fraction`."""

    kind: str = "adamw"
    """adamw (fp32 states), or adamw8bit (states in blocks of 8 bits, a quarter of the memory)."""
    lr: float = 3e-4
    """Learning rate after the warm-up."""
    beta1: float = 0.9
    """Memory of the mean of gradients."""
    beta2: float = 0.95
    """Memory of the mean of squared gradients."""
    weight_decay: float = 0.1
    """Share of a weight matrix that is taken away per step, times the learning rate."""
    warmup_steps: int = 10
    """Steps in which the learning rate grows from zero."""
    final_lr_fraction: float = 0.1
    """Learning rate of the last step, as a fraction of `lr`."""
    max_grad_norm: float = 1.0
    """Gradients whose global L2 norm is larger are scaled down to it."""


@dataclass(kw_only=True)
class TrainConfig:
    """The loop."""

    steps: int = 100
    """Optimizer steps of the whole run, resumed ones included."""
    accumulation: int = 1
    """Sequences each data-parallel rank adds up before one optimizer step."""
    recompute: bool = False
    """Keep only each layer's input and compute the rest again in backward."""
    loss_tile_tokens: int = 1024
    """Tokens whose logits exist at the same time."""
    label_smoothing: float = 0.0
    """Share of each label that is spread evenly over the whole vocabulary; in the loss a run reports, never in the one
    of `farspan evaluate`."""
    z_loss: float = 0.0
    """What the square of the logits' log-sum-exp counts in the loss of each label (1e-4 keeps logits small); reported
    and evaluated as label smoothing is."""
    checkpoint_every: int = 0
    """Steps between resumable checkpoints; 0: only at the end."""
    reprobe_every: int = 0
    """Steps between probes of the running layout, with the live weights, against one plain process on rank 0; a probe
    that fails stops the run. 0: none. A probe holds all weights once more in rank 0's memory."""
    resume: bool = True
    """Go on from the newest checkpoint of this run, if there is one."""
    checkpoint_async: bool = False
    """Write checkpoints behind the steps that follow, each process its own piece; the model is published at the end
    either way. False: rank 0 gathers an ordinary Hugging Face folder while the steps wait."""
    keep_checkpoints: int = 0
    """Newest checkpoints that are kept; 0: all."""
    keep_every: int = 0
    """Checkpoints after a multiple of so many steps are kept for ever; 0: only the newest are kept."""
    max_restarts: int = 3
    """Lost workers, nodes or controllers forgiven in any one hour: the run goes on from its newest checkpoint."""
    certificate: str | None = None
    """Certificate of `farspan doctor`, local or s3://: the run starts only if it vouches for this model and layout."""


@dataclass(kw_only=True)
class MemoryConfig:
    """What a step gives up to need less memory."""

    tiled_mlp: bool = False
    """Compute feed-forward layers and normalizations by tiles of tokens, and each tile again in backward."""
    mlp_tile_tokens: int = 0
    """Tokens of such a tile; 0: as many as the model is wide."""
    offload_activations: str = "none"
    """Where tensors kept for backward wait: none (the device), cpu, cxl, nvme; auto: in tiers and host memory, as their
    speeds and room decide (the plan says why); with chunk, where the arena lies."""
    swap_share: int | float | str = 0.0
    """With recompute and offload: share of a layer's tokens whose products wait there instead of being computed again;
    above 0 attention is never computed again (MEMO), at 0 it is. auto: as much as copies can hide behind computing, by
    measuring the tier and a layer when the run starts; it may be 0."""
    tiers: list[str] = field(default_factory=list)
    """Memory beside the device: dram:SIZE, cxl:node=N:SIZE, cxl:/dev/daxX.Y:SIZE, cxl:emulated:SIZE, nvme:FOLDER:SIZE;
    SIZE is what each process takes; offload to cpu needs none. weights.offload_optimizer takes of them, too."""
    speeds: str | None = None
    """What `farspan bench memory --json` wrote about these tiers, local or s3://; none: where tiers of one kind share
    the load, the run measures them once and keeps tiers.json in its output."""
    chunk: str = "none"
    """none, seco (exact: the sequence goes through the model chunk by chunk), spaco (chunks are drawn, as
    chunk_sampling says)."""
    chunk_tokens: int = 4096
    """Tokens of a chunk."""
    chunk_keep: float = 0.5
    """chunk=spaco: share of the chunks that are drawn for backward."""
    chunk_sampling: str = "independent"
    """chunk=spaco: independent (each chunk with probability chunk_keep; unbiased), importance (the more labels a chunk
    holds, the more often; unbiased), without_replacement (as published, a fixed number of chunks: biased, for
    comparison). All but independent need chunk_keep_labelled=false."""
    chunk_keep_labelled: bool = True
    """chunk=spaco: chunks that hold labels are always computed; false (unmasked text) draws them too."""
    limit_gib: float = 0.0
    """Most memory a process may take on its GPU, or, on a CPU, beyond what it has when it is ready; 0: no limit."""
    step_down: bool = True
    """After a rank ran out of memory, go on from the same batch with a plan that needs less."""


@dataclass(kw_only=True)
class PlanConfig:
    """What the planner may decide."""

    choose: str = "auto"
    """auto: on GPUs, what the config does not set is chosen; always: on CPUs too; never: everything as it is set."""
    gpu: str | None = None
    """Kind of GPU the workers get, such as h100 or a100-80; none: this machine is asked and measured, or with --cluster
    its nodes are asked."""
    gpus_per_node: int = 8
    """GPUs of one machine."""
    calibration: str | None = None
    """Speeds that `farspan plan --calibrate` measured; none: assumed shares of the data sheet."""


@dataclass(kw_only=True)
class ResourcesConfig:
    """What each training process asks Ray for."""

    cpus_per_worker: float = 1.0
    """CPUs of a process; without a GPU also the threads it computes with."""
    gpus_per_worker: float = 0.0
    """1 trains on GPUs over NCCL, 0 on CPUs over gloo."""
    custom: dict[str, float] = field(default_factory=dict)
    """Further resources of a process, such as farspan-train=1, which nodes of that type alone have."""
    timeout_s: float = 600.0
    """Longest wait for workers to start, for one collective operation, and for an object store that does not answer."""
    peak_tflops: float = 0.0
    """Most operations a second of one device, in 1e12, that utilization is measured against; 0: its data sheet's."""
    price_per_gpu_hour: float = 0.0
    """What one worker's device costs for an hour, in any currency; 0: no cost is shown."""


@dataclass(kw_only=True)
class TelemetryConfig:
    """Where the numbers of a run go beside its event log."""

    tensorboard: bool = False
    """Write them to <output>/tensorboard too (a local output; needs the package tensorboard)."""


@dataclass(kw_only=True)
class RunConfig:
    """`farspan train`."""

    name: str = "run"
    """Name of the run, also of its job on a cluster."""
    output: str = "runs/${name}"
    """Folder of the run: events, checkpoints, the exported model; local or s3://."""
    seed: int = 0
    """Decides random weights and the order of the data."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)


@dataclass(kw_only=True)
class RoleConfig:
    """One kind of worker."""

    replicas: int = 1
    """Workers of this kind, at first where their number changes."""
    min_replicas: int | None = None
    """Fewest of them, 0 to stop them all while nobody asks; none: always `replicas`."""
    max_replicas: int | None = None
    """Most of them; none: `replicas`, and at least one."""
    cpus: float = 0.5
    """CPUs each of them, or each rank of it, asks Ray for."""
    gpus: float = 0.0
    """GPUs each of them, or each rank of it, asks Ray for."""
    custom: dict[str, float] = field(default_factory=dict)
    """Further resources each of them asks for, such as farspan-decode=1, which nodes of that type alone have."""

    @property
    def least(self) -> int:
        """Fewest workers of this kind at any time."""
        return self.replicas if self.min_replicas is None else self.min_replicas

    @property
    def most(self) -> int:
        """Most workers of this kind at any time."""
        return max(1, self.replicas) if self.max_replicas is None else self.max_replicas


@dataclass(kw_only=True)
class EngineConfig:
    """The inference engine inside each worker."""

    dtype: str = "float32"
    """Compute and KV type: bfloat16, float32, float64."""
    page_tokens: int = 16
    """Tokens of one KV page."""
    kv_bytes: int = 256 * 1024 * 1024
    """Memory for KV pages in each worker, or in each rank of it, those of a draft model included; never exceeded."""
    tensor_parallel: int = 1
    """Ranks of each worker: processes of one machine that share its weights and KV pages, some heads each."""
    max_batch_tokens: int = 2048
    """Tokens computed in one iteration; longer prompts are computed in chunks."""
    max_sequences: int = 64
    """Sequences decoded side by side."""
    graph_rows: int = 128
    """Decode of up to so many sequences is one launch a step: on a GPU CUDA graphs, captured at start; on a CPU, for up
    to 16, a list of compiled calls, made while requests run. 0: none."""
    prefill_tokens: int | None = None
    """Most tokens of prompts in one iteration; none: all of max_batch_tokens."""
    decode_tokens: int | None = None
    """Most sequences that decode in one iteration; none: all that fit."""
    prefix_cache: bool = True
    """Find the KV of prompts that begin like earlier ones. A model with a state per sequence finds nothing."""
    offload_bytes: int = 0
    """Host memory for the KV and the states of preempted sequences; 0, as a model that runs alone needs: they are
    computed again."""
    host_cache_bytes: int = 0
    """Memory of each machine, one part for all its workers, for the KV of prompts beyond kv_bytes; it outlives a
    worker. 0: none."""
    max_context_tokens: int | None = None
    """Longest prompt plus answer; none: what the model's config says."""
    draft_tokens: int = 0
    """Tokens guessed ahead in each sequence and checked in one go; changes no answer. 0, or a model with a state per
    sequence: none."""
    draft_model: str | None = None
    """Hugging Face folder of a smaller model with the same tokens that guesses them, local or s3://; none: guessed is
    what followed the same words before."""
    adapters: dict[str, str] = field(default_factory=dict)
    """LoRA adapters a request may name: name -> folder in peft's format, local or s3://."""
    adapter_bytes: int = 256 * 1024 * 1024
    """Memory for adapters on the device of each worker; those not in use wait in host memory."""
    threads: int = 0
    """CPU threads of the worker; 0: its share of the machine."""


@dataclass(kw_only=True)
class BatchConfig:
    """What `farspan batch` takes as KEY=VALUE."""

    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass(kw_only=True)
class TransferConfig:
    """How KV pages travel from a prefill worker to a decode worker."""

    transport: str = "auto"
    """nixl; object_store: Ray's; auto: nixl, and object_store where that is missing or cannot start."""
    deadline_s: float = 30.0
    """Longest wait for one prompt's pages."""
    lease_s: float = 60.0
    """How long a prefill worker keeps pages that nobody fetched."""
    split: str = "predicted"
    """predicted: a prompt is computed by another worker than its answer where that is expected to cost everybody less
    time; always: by a prefill worker, and its answer by a decode worker."""
    colocate_below_tokens: int = 0
    """Shorter prompts are computed by the worker that answers; 0: none for that reason alone."""


@dataclass(kw_only=True)
class ObjectivesConfig:
    """What clients should see: the number of workers, and who is let in, follow from it."""

    first_token_s: float = 2.0
    """Until the first token."""
    token_s: float = 0.1
    """Between two tokens."""
    max_wait_s: float | None = None
    """Requests whose first token is expected later get status 429 and are told when to come again; none: only those
    that it would reach after their own deadline."""


@dataclass(kw_only=True)
class ScalingConfig:
    """How fast the number of workers follows, where `min_replicas` and `max_replicas` leave it open."""

    up_s: float = 10.0
    """More workers, when they were needed all this time."""
    down_s: float = 120.0
    """Fewer workers, when they were not needed all this time."""
    to_zero_s: float = 600.0
    """No worker, when nobody asked all this time."""
    measure_s: float = 2.0
    """How often the endpoint tells what it sees."""


@dataclass(kw_only=True)
class TracesConfig:
    """Where an endpoint sends what its requests took."""

    otlp_endpoint: str | None = None
    """Collector that takes spans of OpenTelemetry over HTTP, as http://collector:4318; none: they go nowhere."""


@dataclass(kw_only=True)
class ServeConfig:
    """`farspan serve`."""

    model: str = MISSING
    """Hugging Face folder (config, safetensors, tokenizer), local or s3://."""
    name: str | None = None
    """Model name clients ask for; none: the last part of `model`."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on."""
    listener: str = "proxy"
    """Who listens: proxy (Ray Serve's, on every node with a worker), ingress (itself, where it runs; costs less)."""
    api_key_file: str | None = None
    """File with one key per line, mode 600; none (loopback only): a key is made once and its path is printed."""
    tool_format: str = "auto"
    """How the model writes calls of tools: hermes (tags around JSON), llama3 (bare JSON); auto: as in its template."""
    share_prefixes: bool = False
    """Whether requests of different API keys may use each other's KV; who waits less then knows what others asked."""
    max_body_bytes: int = 8 * 1024 * 1024
    """Largest request body; larger ones are refused with status 413."""
    body_timeout_s: float = 60.0
    """Longest wait for the whole body of a request; slower ones are refused with status 408."""
    stream_interval_s: float = 0.1
    """Longest time for which a worker with many answers keeps a token, to tell it with the next; 0: none is kept."""
    prefill: RoleConfig = field(default_factory=RoleConfig)
    decode: RoleConfig = field(default_factory=RoleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    telemetry: TracesConfig = field(default_factory=TracesConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    drain_s: float = 120.0
    """How long a worker that is stopped or replaced may finish its answers; those left go on elsewhere."""
    start_timeout_s: float = 300.0
    """Longest wait until a worker of each kind answers."""
    request_timeout_s: float = 600.0
    """Longest time for one request, from its first bytes to the end of its answer; what it holds is freed then."""

    @property
    def proxy_timeout_s(self) -> float:
        """When Serve's proxy ends a request that the ingress did not: it cannot say why in a way clients understand."""
        return self.request_timeout_s + _PROXY_LATER_S
