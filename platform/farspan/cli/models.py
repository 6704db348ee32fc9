"""`farspan evaluate` and `farspan export`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from farspan.storage.paths import absolute_uri

if TYPE_CHECKING:
    from farspan.jobs.evaluate import Evaluation, EvaluationPlan


def run_evaluate(plan: EvaluationPlan, output: str | None, *, as_json: bool) -> None:
    """Print what a model makes of long contexts; write it, with a picture, to the folder `output`."""
    from transformers.utils.logging import disable_progress_bar

    from farspan.jobs.evaluate import evaluate

    disable_progress_bar()
    result = evaluate(plan, lambda line: typer.echo(line, err=True))
    text = json.dumps({"plan": asdict(plan), **asdict(result)}, indent=1)
    if output is not None:
        from farspan.jobs.evaluate_plot import draw_evaluation
        from farspan.storage.door import open_store

        store = open_store(absolute_uri(output))
        store.write_bytes("evaluation.json", text.encode())
        store.write_bytes("evaluation.png", draw_evaluation(result))
    if as_json:
        typer.echo(text)
        return
    _show_loss(result)
    _show_recall(result)


def _show_loss(result: Evaluation) -> None:
    for entry in result.loss:
        typer.echo(
            f"context {entry.length:,}: loss {entry.loss:.4f} nats/token, perplexity {entry.perplexity:.2f}, "
            f"{entry.tokens:,} tokens"
        )
        typer.echo("position in document      loss    tokens")
        for low, high, loss, tokens in entry.by_position:
            typer.echo(f"{f'{low}..{high}':>20} {loss:9.4f} {tokens:9,}")


def _show_recall(result: Evaluation) -> None:
    for task in dict.fromkeys(row.task for row in result.recall):
        rows = [row for row in result.recall if row.task == task]
        lengths = sorted({row.length for row in rows})
        typer.echo(f"{task + ', depth':>20} " + " ".join(f"{length:>9,}" for length in lengths))
        for depth in sorted({row.depth for row in rows}):
            found = {row.length: f"{row.correct}/{row.samples}" for row in rows if row.depth == depth}
            typer.echo(f"{depth:>20.0%} " + " ".join(f"{found[length]:>9}" for length in lengths))


def run_export(checkpoint: str, output: str, dtype: str) -> None:
    """Publish a checkpoint as a Hugging Face folder."""
    from transformers.utils.logging import disable_progress_bar

    from farspan.jobs.export import export_checkpoint

    disable_progress_bar()

    used = export_checkpoint(absolute_uri(checkpoint), absolute_uri(output), dtype)
    typer.echo(f"{used} -> {absolute_uri(output)} ({dtype})")
