"""`farspan evaluate` and `farspan export`."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from farspan.storage.paths import absolute_uri


def run_evaluate(model: str, corpus: str, sequences: int, sequence_tokens: int, seed: int, *, as_json: bool) -> None:
    """Print a model's loss."""
    from transformers.utils.logging import disable_progress_bar

    from farspan.jobs.evaluate import evaluate

    disable_progress_bar()

    def tell(done: int) -> None:
        typer.echo(f"sequence {done}/{sequences}", err=True)

    result = evaluate(absolute_uri(model), absolute_uri(corpus), sequences, sequence_tokens, seed, tell)
    if as_json:
        typer.echo(json.dumps(asdict(result)))
        return
    typer.echo(f"loss {result.loss:.4f} nats/token, perplexity {result.perplexity:.2f}, {result.tokens:,} tokens")
    typer.echo("position in document      loss    tokens")
    for low, high, loss, tokens in result.by_position:
        typer.echo(f"{f'{low}..{high}':>20} {loss:9.4f} {tokens:9,}")


def run_export(checkpoint: str, output: str, dtype: str) -> None:
    """Publish a checkpoint as a Hugging Face folder."""
    from transformers.utils.logging import disable_progress_bar

    from farspan.jobs.export import export_checkpoint

    disable_progress_bar()

    used = export_checkpoint(absolute_uri(checkpoint), absolute_uri(output), dtype)
    typer.echo(f"{used} -> {absolute_uri(output)} ({dtype})")
