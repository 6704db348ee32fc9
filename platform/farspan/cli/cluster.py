"""`farspan cluster`: from a spec to machines and back."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from farspan.errors import ConfigError, NotFoundError

if TYPE_CHECKING:
    from farspan.cli.launch import Launched
    from farspan.cluster.cost import ClusterPlan
    from farspan.config.cluster import ClusterSpec

app = typer.Typer(help="Clusters for Ray's launcher: what they cost, up, down.", no_args_is_help=True)

Spec = Annotated[str | None, typer.Argument(help="Spec [infra/cluster.yaml], or KEY=VALUE.", metavar="[SPEC]")]
Overrides = Annotated[list[str] | None, typer.Argument(help="a.b=c settings of it.", metavar="[KEY=VALUE]...")]
On = Annotated[str, typer.Option("--on", help="aws, gcp or local.")]
OnOrHere = Annotated[str, typer.Option("--on", help="aws, gcp, local, or here: several nodes on this machine.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Train = Annotated[str | None, typer.Option(metavar="CONFIG", help="A run whose workers must find room on it.")]
Serve = Annotated[str | None, typer.Option(metavar="CONFIG", help="An endpoint whose workers must find room on it.")]
_DOWN_TIMEOUT_S = 900.0


def load_spec(spec: str | None, overrides: list[str] | None) -> ClusterSpec:
    """A checked spec; without a file the one of the project, or the one that ships with farspan."""
    from farspan.cli.configs import shipped_config
    from farspan.config.cluster import ClusterSpec
    from farspan.config.cluster_rules import check_cluster
    from farspan.config.load import load_config

    # Without a file the first KEY=VALUE stands in its place.
    first = [spec] if spec is not None and "=" in spec else []
    file = shipped_config("cluster.yaml") if spec is None or first else spec
    loaded = load_config(ClusterSpec, file, [*first, *(overrides or [])])
    check_cluster(loaded)
    return loaded


@app.command()
def plan(
    spec: Spec = None,
    overrides: Overrides = None,
    on: On = "aws",
    train: Train = None,
    serve: Serve = None,
    as_json: Json = False,
) -> None:
    """Show the machines of a cluster and what an hour of them costs; asks no cloud. Exit code 2: no room."""
    import yaml

    from farspan.cluster.cost import plan_cluster
    from farspan.cluster.launcher import render_launcher

    loaded, provider = load_spec(spec, overrides), _provider(on)
    found = plan_cluster(loaded, provider)
    _tell_examples(loaded, provider)
    unplaced = _unplaced(yaml.safe_load(render_launcher(loaded, provider)), train, serve)
    if as_json:
        typer.echo(json.dumps({**asdict(found), "unplaced": unplaced}, indent=1))
    else:
        _show(found)
        for sentence in unplaced:
            typer.echo(sentence)
    if unplaced:
        raise typer.Exit(2)


@app.command()
def validate(
    spec: Spec = None,
    overrides: Overrides = None,
    on: On = "aws",
    file: Annotated[str | None, typer.Option(help="A launcher file instead of the one the spec renders.")] = None,
    train: Train = None,
    serve: Serve = None,
    as_json: Json = False,
) -> None:
    """Hold a launcher file against Ray's schema, the cloud's and our rules, offline; exit code 2: it has problems."""
    import yaml

    from farspan.cli.launcher import problems
    from farspan.cluster.launcher import render_launcher

    loaded = load_spec(spec, overrides)
    text = _read(file) if file is not None else render_launcher(loaded, _provider(on))
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as problem:
        raise ConfigError(file or on, "must be YAML", " ".join(str(problem).split()), "fix the syntax") from None
    if not isinstance(config, dict):
        raise ConfigError(file or on, "must hold `key: value` lines", type(config).__name__, "start with cluster_name")
    if file is None:
        _tell_examples(loaded, on)
    # A file with problems may have no node types to look at.
    found = problems(config, loaded.software) or _unplaced(config, train, serve)
    report({file or f"the {on} file": found}, as_json=as_json)


@app.command()
def up(
    spec: Spec = None,
    overrides: Overrides = None,
    on: OnOrHere = "aws",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=1, help="Give up after [up_timeout_s].")
    ] = None,
) -> None:
    """Show the plan, ask, and start the cluster within a time limit; run again, it goes on where it is."""
    import yaml

    from farspan.cli.launch import ask_cloud, refuse_to_forget, run_launcher
    from farspan.cluster.cost import plan_cluster
    from farspan.cluster.launcher import render_launcher
    from farspan.cluster.preflight import check_ready

    loaded, provider = load_spec(spec, overrides), _provider(on, here=True)
    launched = _launched(loaded.name, provider)
    if provider == "here":
        _up_here(loaded, launched, timeout)
        return
    check_ready(loaded, provider, Path.cwd(), launched.folder)
    text = render_launcher(loaded, provider)
    ask_cloud(yaml.safe_load(text)["provider"])
    refuse_to_forget(launched, text)
    _show(plan_cluster(loaded, provider))
    _ask(yes, "Start it?")
    launched.keep(text)
    console = Console(highlight=False, soft_wrap=True)
    console.print("what was started goes on costing if this fails: `farspan cluster down` ends it", markup=False)
    with console.status("ray up", spinner="line") as status:
        run_launcher(launched, "up", timeout or loaded.up_timeout_s, lambda line: status.update(line[:100]))
    console.print(f"up: {loaded.name}; its dashboard: ray dashboard {launched.file}", markup=False)


@app.command()
def status(spec: Spec = None, overrides: Overrides = None, on: OnOrHere = "aws", as_json: Json = False) -> None:
    """List the machines of a cluster, asked of its provider."""
    from farspan.cli.launch import nodes_of

    loaded, provider = load_spec(spec, overrides), _provider(on, here=True)
    if provider == "here":
        from farspan.cli.here import nodes_here

        nodes = nodes_here(_launched(loaded.name, provider).folder)
    else:
        nodes = nodes_of(_known(loaded, provider))
    if as_json:
        typer.echo(json.dumps({"name": loaded.name, "nodes": [asdict(node) for node in nodes]}, indent=1))
        return
    table = Table("node", "type", "address", "status", box=None)
    for node in nodes:
        table.add_row(node.id, node.node_type, node.address or "", node.status)
    nothing = f"no machine of {loaded.name} runs"
    if provider == "local":
        nothing = (
            f"Ray's record on this machine names no machine of {loaded.name}; farspan cluster down ends any that run"
        )
    Console(highlight=False, soft_wrap=True).print(table if nodes else nothing)


@app.command()
def down(
    spec: Spec = None,
    overrides: Overrides = None,
    on: OnOrHere = "aws",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=1, help="Give up after.")] = _DOWN_TIMEOUT_S,
) -> None:
    """End every machine of a cluster; where none is left, it says so. With --on local Ray is stopped on each."""
    from farspan.cli.launch import nodes_of
    from farspan.cli.machines import stop_cluster

    loaded, provider = load_spec(spec, overrides), _provider(on, here=True)
    if provider == "here":
        from farspan.cli.here import down as down_here

        count = down_here(_launched(loaded.name, provider).folder)
        typer.echo(f"down: {loaded.name}, {count} nodes" if count else f"no node of {loaded.name} runs here")
        return
    launched, config = _launched(loaded.name, provider), _known(loaded, provider)
    if provider == "local":
        # Ray's record of machines that stay is a file in /tmp: where it is lost they may still run.
        _ask(yes, f"Stop Ray on every machine of {loaded.name}?")
        count = stop_cluster(launched, config, timeout)
        typer.echo(f"down: {loaded.name}, Ray is stopped on {count} machines, which stay")
        return
    there = nodes_of(config)
    if not there:
        typer.echo(f"no machine of {loaded.name} runs")
        return
    _ask(yes, f"End {len(there)} machines of {loaded.name}?")
    _down_cloud(loaded.name, launched, config, timeout)
    typer.echo(f"down: {loaded.name}, {len(there)} machines")


def _down_cloud(name: str, launched: Launched, config: dict[str, Any], timeout_s: float) -> None:
    import yaml

    from farspan.cli.launch import nodes_of, run_launcher
    from farspan.errors import ClusterError

    launched.keep(yaml.safe_dump(config, sort_keys=False))
    run_launcher(launched, "down", timeout_s, lambda line: None)
    left = nodes_of(config)
    if left:
        raise ClusterError(f"{len(left)} machines of {name} still run: {left[0].id}; run it again")
    # The next one is what its spec then says.
    launched.file.unlink()


def _unplaced(launcher: dict[str, Any], train: str | None, serve: str | None) -> list[str]:
    """What of a run and of an endpoint has no room on the nodes of a launcher file."""
    from farspan.cluster.placement import asks_of_endpoint, asks_of_run, misfits
    from farspan.config.load import load_config
    from farspan.config.schema import RunConfig, ServeConfig

    asks = []
    if train is not None:
        asks += asks_of_run(load_config(RunConfig, train, []))
    if serve is not None:
        asks += asks_of_endpoint(load_config(ServeConfig, serve, []))
    return misfits(launcher, asks)


def report(found: dict[str, list[str]], *, as_json: bool) -> None:
    """Print the problems of each file; ends with exit code 2 where there is one."""
    wrong = sum(len(problems) for problems in found.values())
    if as_json:
        typer.echo(json.dumps({"ok": wrong == 0, "problems": found}, indent=1))
    else:
        for name, problems in found.items():
            for problem in problems:
                typer.echo(f"{name}: {problem}")
            if not problems:
                typer.echo(f"{name}: ok")
    if wrong:
        raise typer.Exit(2)


def _tell_examples(spec: ClusterSpec, provider: str) -> None:
    """Name what `up` will refuse, before somebody counts on it."""
    from farspan.cluster.examples import examples_of

    if examples := examples_of(spec, provider):
        fields = ", ".join(examples)
        typer.echo(f"warning: still examples, which farspan cluster up refuses: {fields}; set yours", err=True)


def _ask(yes: bool, question: str) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError("--yes", "must be given where nobody can answer", False, "add --yes")
    typer.confirm(question, abort=True)


@app.command("watch-spot")
def watch_spot(
    metadata: Annotated[str, typer.Option(metavar="URL", help="Instance metadata.")] = "http://169.254.169.254",
    poll: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="Between two looks.")] = 5.0,
) -> None:
    """On a node of EC2: wait for the notice that it is taken back, and let Ray drain it. The AWS file starts this."""
    from farspan.cli.spot import watch_spot as watch

    watch(metadata, poll, typer.echo)


def _up_here(spec: ClusterSpec, launched: Launched, timeout_s: float | None) -> None:
    from farspan.cli.here import up as up_here
    from farspan.jobs.launch import make_token

    make_token()
    console = Console(highlight=False, soft_wrap=True)
    with console.status("ray start", spinner="line") as status:
        address = up_here(spec.here, launched.folder, timeout_s or spec.up_timeout_s, status.update)
    console.print(
        f"up: {spec.name}, a head and {spec.here.workers} workers on this machine; hand it work with --cluster "
        f"{address}",
        markup=False,
    )


def _provider(on: str, *, here: bool = False) -> str:
    from farspan.cluster.launcher import PROVIDERS
    from farspan.config.load import nearest

    known = [*PROVIDERS, "here"] if here else list(PROVIDERS)
    if on not in known:
        raise ConfigError("--on", f"must be one of {', '.join(known)}", on, nearest(on, known))
    return on


def _launched(name: str, provider: str) -> Launched:
    from farspan.cli.launch import Launched

    return Launched(Path.home() / ".cache" / "farspan" / "clusters" / f"{name}-{provider}")


def _known(spec: ClusterSpec, provider: str) -> dict[str, Any]:
    """The launcher file of a cluster as it was started; where this machine did not start it, as the spec says."""
    import yaml

    from farspan.cluster.launcher import render_launcher

    launched = _launched(spec.name, provider)
    if launched.file.is_file():
        return launched.config()
    return dict(yaml.safe_load(render_launcher(spec, provider)))


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise NotFoundError(file, "no such launcher file that can be read") from None


def _show(found: ClusterPlan) -> None:
    title = f"{found.name} on {found.provider}, {found.place}"
    table = Table("node type", "machine", "GPUs", "nodes", f"{found.currency}/h each", "idle", title=title, box=None)
    for node in found.nodes:
        nodes = str(node.max_nodes) if node.min_nodes == node.max_nodes else f"{node.min_nodes}..{node.max_nodes}"
        price = "not known" if node.price is None else f"{node.price:.2f}" + (" (spot: less)" if node.spot else "")
        idle = "stays" if node.idle_minutes is None else f"{node.idle_minutes} min"
        table.add_row(node.node_type, node.machine, str(node.gpus or ""), nodes, price, idle)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    if found.least is None or found.most is None:
        console.print("its cost is not known: set price_per_hour of each kind of node", markup=False)
    elif found.most > 0:
        console.print(
            f"an hour costs {found.least:.2f} {found.currency} when idle, at most {found.most:.2f}; disks, traffic and "
            "taxes come on top",
            markup=False,
        )
