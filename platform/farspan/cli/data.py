"""`farspan data ...`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from farspan.errors import ConfigError

if TYPE_CHECKING:
    from farspan.config.schema import CorpusConfig
    from farspan.data.corpus import Report
    from farspan.data.manifest import CorpusManifest

app = typer.Typer(help="Build corpora.", no_args_is_help=True)


@app.callback()
def _data() -> None:
    """Build corpora."""


@app.command()
def build(
    config: Annotated[str, typer.Argument(help="YAML config file.", metavar="CONFIG")],
    overrides: Annotated[list[str] | None, typer.Argument(help="a.b=c overrides.", metavar="[KEY=VALUE]...")] = None,
    parallel: Annotated[
        bool, typer.Option("--parallel", help="Read and tokenize in one process per CPU, by Ray Data.")
    ] = False,
    join: Annotated[
        bool, typer.Option("--join", help="With --parallel: on the Ray cluster this process belongs to.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved config, read nothing.")] = False,
) -> None:
    """Turn texts or conversations into a tokenized corpus of Arrow shards."""
    from farspan.cli.progress import BuildProgressBar
    from farspan.config.check import check_corpus
    from farspan.config.load import dump_config, load_config
    from farspan.config.schema import CorpusConfig

    resolved = load_config(CorpusConfig, config, overrides or [])
    check_corpus(resolved)
    if dry_run:
        typer.echo(dump_config(resolved), nl=False)
        return
    if join and not parallel:
        raise ConfigError("--join", "must come with --parallel", True, "add --parallel")
    with BuildProgressBar() as bar:
        manifest = _build_parallel(resolved, bar, join=join) if parallel else _build_here(resolved, bar)
    bar.finish(manifest, resolved.output)


def _build_here(config: CorpusConfig, progress: Report) -> CorpusManifest:
    from farspan.data.corpus import build_corpus

    return build_corpus(config, progress)


def _build_parallel(config: CorpusConfig, progress: Report, *, join: bool) -> CorpusManifest:
    from farspan.jobs.corpus import build_corpus_parallel
    from farspan.jobs.launch import joined_ray, local_ray

    with joined_ray() if join else local_ray(1):
        return build_corpus_parallel(config, progress)
