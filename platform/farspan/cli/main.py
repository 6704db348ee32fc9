"""The `farspan` command. Heavy libraries are imported by the verb that needs them, so that help answers at once.

Exit codes: 0 done, 1 the world failed, 2 something written by the user is wrong, 130 interrupted.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from farspan.cli import cluster as cluster_verbs
from farspan.cli import data as data_verbs
from farspan.cli import infra as infra_verbs
from farspan.cli import jobs as jobs_verbs
from farspan.errors import CheckpointError, ConfigError, FarspanError, ModelError, NotFoundError, PlanError

USER_ERRORS = (ConfigError, NotFoundError, CheckpointError, ModelError, PlanError)

app = typer.Typer(
    name="farspan",
    help="Train and serve long-context language models on Ray, held against one plain process.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_verbs.app, name="data")
app.add_typer(jobs_verbs.app, name="jobs")
app.add_typer(cluster_verbs.app, name="cluster")
app.add_typer(infra_verbs.app, name="infra")

Config = Annotated[str, typer.Argument(help="YAML config file.", metavar="CONFIG")]
Configs = Annotated[
    list[str],
    typer.Argument(
        help="YAML config files, then a.b=c overrides, which hold for all.", metavar="CONFIG... [KEY=VALUE]..."
    ),
]
Overrides = Annotated[list[str] | None, typer.Argument(help="a.b=c overrides of the config.", metavar="[KEY=VALUE]...")]


@app.command()
def quickstart(
    overrides: Overrides = None,
    folder: Annotated[str, typer.Option(help="Where everything is written.")] = "runs/quickstart",
    fresh: Annotated[bool, typer.Option(help="Start over instead of resuming what is there.")] = True,
) -> None:
    """Data, training, serving and a report on this machine, end to end, in minutes."""
    from farspan.cli.quickstart import run_quickstart

    run_quickstart(folder, overrides or [], fresh=fresh)


@app.command()
def plan(
    config: Annotated[str | None, typer.Argument(help="YAML config file.", metavar="CONFIG")] = None,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME[:COUNT]", help="Devices of a machine, such as h100:8; cpu is this one.")
    ] = None,
    seq: Annotated[str | None, typer.Option(metavar="TOKENS", help="Tokens of a sequence: 131072, 128K, 1M.")] = None,
    nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Model folder or model_type instead of a config; then KEY=VALUE")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Plans to show.")] = 5,
    explain: Annotated[bool, typer.Option("--explain", help="Every reason why plans were refused.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    host: Annotated[float | None, typer.Option(metavar="GIB", help="Host memory of a machine.")] = None,
    memory: Annotated[float | None, typer.Option(metavar="GIB", help="Use only this much of each device.")] = None,
    cxl: Annotated[float, typer.Option(metavar="GIB", min=0, help="CXL memory of a machine.")] = 0.0,
    nvme: Annotated[float, typer.Option(metavar="GIB", min=0, help="NVMe space of a machine for offload.")] = 0.0,
    optimizer: Annotated[str, typer.Option(help="adamw, or adamw8bit, whose states are rounded.")] = "adamw",
    lora_rank: Annotated[int, typer.Option(min=0, help="Train adapters of this rank only; 0: all weights.")] = 0,
    calibration: Annotated[str | None, typer.Option(metavar="FILE", help="Speeds that --calibrate measured.")] = None,
    calibrate: Annotated[
        str | None, typer.Option(metavar="FILE", help="Measure this machine's speeds, nothing else.")
    ] = None,
) -> None:
    """Show what a training config would do and cost; with --gpu, find the best way to train on that machine."""
    if calibrate is not None:
        from farspan.cli.plan import run_calibrate

        run_calibrate(calibrate)
        return
    given = list(overrides or [])
    if config is not None and model is not None:
        # Without a config the first KEY=VALUE stands in its place.
        given, config = [config, *given], None
    if gpu is None:
        from farspan.cli.train import show_plan

        _refuse_without_gpu(config, seq=seq, model=model)
        assert config is not None
        show_plan(config, given)
        return
    from farspan.cli.plan import Question, parse_tokens, run_planner

    question = Question(
        config=config,
        overrides=given,
        gpu=gpu,
        tokens=None if seq is None else parse_tokens(seq),
        nodes=nodes,
        model=model,
        host_gib=host,
        memory_gib=memory,
        cxl_gib=cxl,
        nvme_gib=nvme,
        calibration=calibration,
        optimizer=optimizer,
        lora_rank=lora_rank,
    )
    run_planner(question, explain=explain, as_json=as_json, top=top)


def _refuse_without_gpu(config: str | None, *, seq: str | None, model: str | None) -> None:
    for name, value in (("--seq", seq), ("--model", model)):
        if value is not None:
            raise ConfigError("--gpu", f"must be given with {name}", None, "add for example --gpu h100:8")
    if config is None:
        raise ConfigError("CONFIG", "must be given, or --gpu and --model", None, "try farspan plan CONFIG.yaml")


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved config and the plan, start nothing.")
    ] = False,
    cluster: Annotated[str | None, typer.Option(help="Submit to the Ray cluster with this dashboard address.")] = None,
    join: Annotated[bool, typer.Option("--join", help="Run on the Ray this process belongs to.", hidden=True)] = False,
) -> None:
    """Train on a local Ray that is started and stopped, or submit the same run to a cluster."""
    from farspan.cli.train import run_train

    run_train(config, overrides or [], dry_run=dry_run, cluster=cluster, join=join)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="Output folder of a run, local or s3://.", metavar="RUN")],
    output: Annotated[str | None, typer.Option(metavar="FILE", help="Where to. None: RUN/report.html.")] = None,
) -> None:
    """Write the HTML report of a training run from its recorded events; also while it goes on."""
    from farspan.cli.report import run_report

    run_report(run, output)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder or checkpoint, local or s3://.")],
    corpus: Annotated[str, typer.Option(help="Corpus folder from `farspan data build`.")],
    tasks: Annotated[
        str, typer.Option(metavar="TASK,...", help="loss, passkey, needle, variables; separated by commas.")
    ] = "loss",
    lengths: Annotated[
        str | None, typer.Option(metavar="TOKENS,...", help="Context lengths: 1024,4096,32K. None: the model's.")
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="loss: sequences of the longest length to score.")] = 4,
    samples: Annotated[int, typer.Option(min=1, help="Other tasks: questions for each length and depth.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Which sequences and questions.")] = 1,
    output: Annotated[
        str | None, typer.Option(help="Folder for evaluation.json and evaluation.png, local or s3://.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Loss of a model by position and context length, and its recall of facts hidden in real text."""
    from farspan.cli.models import run_evaluate
    from farspan.cli.plan import parse_tokens
    from farspan.jobs.evaluate import EvaluationPlan
    from farspan.storage.paths import absolute_uri

    plan = EvaluationPlan(
        model=absolute_uri(model),
        corpus=absolute_uri(corpus),
        tasks=tuple(dict.fromkeys(task.strip() for task in tasks.split(","))),
        lengths=tuple(parse_tokens(length, "--lengths") for length in lengths.split(",")) if lengths else (),
        sequences=sequences,
        samples=samples,
        seed=seed,
    )
    run_evaluate(plan, output, as_json=as_json)


@app.command()
def batch(
    prompts: Annotated[str, typer.Argument(help="File with a prompt on each line, as JSON.", metavar="PROMPTS.jsonl")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="engine.b=c settings.", metavar="[KEY=VALUE]...")
    ] = None,
    model: Annotated[str, typer.Option(help="Model folder, local or s3://.")] = ...,  # type: ignore[assignment]
    output: Annotated[str, typer.Option(help="File that answers are appended to.")] = ...,  # type: ignore[assignment]
    engines: Annotated[int, typer.Option(min=0, help="Engines on Ray; 0: one in this process.")] = 0,
    join: Annotated[
        bool, typer.Option("--join", help="With --engines: on the Ray cluster this process belongs to.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="0: all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of random choices.")] = 0,
) -> None:
    """Answer a file of prompts; run again after a stop, it goes on with what is missing."""
    from farspan.cli.batch import BatchAsk, run_batch
    from farspan.engine.request import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    run_batch(BatchAsk(prompts, model, output, list(overrides or []), params, engines, join))


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint or run folder, local or s3://.")],
    output: Annotated[str, typer.Argument(help="Folder to publish to, local or s3://.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Publish a checkpoint's weights as an ordinary Hugging Face folder."""
    from farspan.cli.models import run_export

    run_export(checkpoint, output, dtype)


@app.command()
def serve(
    configs: Configs,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved config, start nothing.")] = False,
    cluster: Annotated[
        str | None, typer.Option(help="Submit to the Ray cluster with this dashboard address; it goes on there.")
    ] = None,
    join: Annotated[
        str | None,
        typer.Option(
            "--join", metavar="FILE", help="On the Ray this process belongs to, with these keys.", hidden=True
        ),
    ] = None,
) -> None:
    """Serve the model of each config on Ray Serve with prefill and decode workers, until Ctrl-C; on a cluster until it
    is stopped.
    """
    from farspan.cli.configs import apart
    from farspan.cli.serve import run_serve

    run_serve(*apart(configs), dry_run=dry_run, cluster=cluster, join=join)


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="Endpoint.")] = "http://127.0.0.1:8000/v1",
    api_key_file: Annotated[str | None, typer.Option(help="File with the endpoint's key.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Ask once and leave; otherwise a prompt is read.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
) -> None:
    """Talk to an endpoint; a model without a chat template completes text."""
    from farspan.cli.chat import run_chat

    run_chat(url, api_key_file, prompt, max_tokens, temperature)


@app.command()
def bench(
    what: Annotated[
        str,
        typer.Argument(
            help="attention, paged-decode, sampling, engine, memory, parallel, transfer, long-context, serve, roles, "
            "train, or all (but the last three)."
        ),
    ] = "all",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    save: Annotated[bool, typer.Option("--save", help="Write benchmarks/baselines/<bench>-<machine>.json.")] = False,
    minutes: Annotated[float | None, typer.Option(help="train: length of each of three runs [10].")] = None,
    width: Annotated[int | None, typer.Option(help="train: width of the model [640], by heads of 64.")] = None,
    layers: Annotated[int | None, typer.Option(help="train: its layers [10: 60 million weights].")] = None,
    vllm_env: Annotated[
        str | None,
        typer.Option("--vllm-env", help="engine: a Python environment that holds vLLM, beside which to run."),
    ] = None,
    peers: Annotated[
        str, typer.Option(help="engine: who else runs beside it: generate, batching, both by a comma, or none.")
    ] = "generate,batching",
    turns: Annotated[int, typer.Option(help="engine: how often each is timed.")] = 3,
    long_tokens: Annotated[int | None, typer.Option(help="serve: length of the prompts that disturb [16384].")] = None,
) -> None:
    """Measure this machine, side by side with the best peer, on the same work."""
    from farspan.cli.bench import run_bench

    run_bench(
        what,
        as_json=as_json,
        save=save,
        minutes=minutes,
        width=width,
        layers=layers,
        vllm_env=vllm_env,
        peers=peers,
        turns=turns,
        long_tokens=long_tokens,
    )


@app.command()
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(help="YAML run config, model folder, or model_type of transformers.", metavar="MODEL"),
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the certificate.")] = False,
    certificate: Annotated[str | None, typer.Option(help="File the certificate is written to.")] = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="Instead: whether this machine can be a node.")] = False,
    node: Annotated[
        list[str] | None, typer.Option(metavar="HOST[:PORT]", help="--cluster: a place it must reach; repeatable.")
    ] = None,
) -> None:
    """Prove a layout for a model (the same logits, loss and gradients as one plain process), or check this machine."""
    if cluster:
        from farspan.cli.cluster_doctor import run_cluster_doctor

        run_cluster_doctor(node or [], as_json=as_json)
        return
    if model is None:
        raise ConfigError("MODEL", "must be given, or --cluster", None, "try farspan doctor qwen3")
    from farspan.cli.doctor import run_doctor

    run_doctor(model, overrides or [], as_json=as_json, certificate=certificate)


@app.command()
def version(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Versions of farspan and of what it stands on."""
    from farspan.cli.version import show_version

    show_version(as_json=as_json)


def main() -> None:
    """Entry point."""
    # SIGTERM unwinds like Ctrl-C, so that Ray and child processes are stopped on the way out.
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; gives its exit code. Every deliberate error is one line, without a traceback."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        # The parser turns Ctrl-C into an exit code of its own and gives it back.
        code = app(arguments, standalone_mode=False)
    except FarspanError as problem:
        console.print(f"error: {problem}", style="red", markup=False)
        return 2 if isinstance(problem, USER_ERRORS) else 1
    except typer.Exit as done:
        return done.exit_code
    except (KeyboardInterrupt, typer.Abort):
        console.print("interrupted", style="yellow")
        return 130
    except Exception as problem:
        # What the argument parser refuses; anything else is a bug and keeps its traceback.
        usage = getattr(problem, "format_message", None)
        if usage is None:
            raise
        # A group without a command has shown its help already.
        if said := usage():
            console.print(f"error: {said}; try `farspan --help`", style="red", markup=False)
        return 2
    return code if isinstance(code, int) else 0


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
