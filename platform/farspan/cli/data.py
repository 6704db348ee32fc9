"""`farspan data ...`."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Build corpora.", no_args_is_help=True)


@app.callback()
def _data() -> None:
    """Build corpora."""


@app.command()
def build(
    config: Annotated[str, typer.Argument(help="YAML config file.", metavar="CONFIG")],
    overrides: Annotated[list[str] | None, typer.Argument(help="a.b=c overrides.", metavar="[KEY=VALUE]...")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved config, read nothing.")] = False,
) -> None:
    """Turn text files into a tokenized corpus of Arrow shards."""
    from farspan.cli.progress import BuildProgressBar
    from farspan.config.check import check_corpus
    from farspan.config.load import dump_config, load_config
    from farspan.config.schema import CorpusConfig

    resolved = load_config(CorpusConfig, config, overrides or [])
    check_corpus(resolved)
    if dry_run:
        typer.echo(dump_config(resolved), nl=False)
        return
    from farspan.data.corpus import build_corpus

    with BuildProgressBar() as bar:
        manifest = build_corpus(resolved, bar)
    bar.finish(manifest, resolved.output)
