"""Writes docs/reference/: pages that are read from the code, so that they cannot disagree with it.

Run by `make docs` and, as a hook, by every `mkdocs build`.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from farspan.config import cluster, schema
from farspan.serve.metrics import Metrics
from farspan.telemetry import kinds
from farspan.telemetry.names import METRICS

QUOTES = "'\""
DOCS = Path(__file__).resolve().parent
TARGET = DOCS / "reference"
# One file a user writes each.
FILES = {"RunConfig": "farspan train", "CorpusConfig": "farspan data build", "ServeConfig": "farspan serve",
         "ClusterSpec": "farspan cluster"}  # fmt: skip


def on_pre_build(config: object) -> None:
    """Called by mkdocs before it looks for pages."""
    write_reference()


def write_reference() -> list[Path]:
    """Write every generated page; gives their paths. Unchanged pages are left alone, so that a watcher can rest."""
    pages = {
        "config.md": config_page(),
        "cli.md": cli_page(),
        "metrics.md": metrics_page(),
        "decisions.md": decisions(),
    }
    TARGET.mkdir(exist_ok=True)
    for name, text in pages.items():
        path = TARGET / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    return [TARGET / name for name in pages]


def config_page() -> str:
    """Every key a user can set."""
    trees = (_tree(schema), _tree(cluster))
    classes = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
    parts = [
        "# Configuration\n\nRead from `farspan/config`. A config file holds only what differs from these "
        "defaults; `key=value` on the command line wins over the file. `required` has no default that could be right.\n"
    ]
    for name, verb in FILES.items():
        parts.append(f"## `{verb}`\n\n| key | type | default | meaning |\n|---|---|---|---|")
        parts.extend(_config_rows(classes, name, ""))
        parts.append("")
    return "\n".join(parts)


def _config_rows(classes: dict[str, ast.ClassDef], name: str, prefix: str) -> Iterator[str]:
    sections = []
    for key, hint, default, meaning in described_fields(classes[name]):
        if hint in classes:
            sections.append((hint, f"{prefix}{key}."))
        else:
            yield f"| `{prefix}{key}` | {_type(hint)} | {_default(default)} | {_cell(meaning)} |"
    for section, inner in sections:
        about = ast.get_docstring(classes[section]) or ""
        yield f"| **`{inner[:-1]}`** | | | *{_cell(about)}* |"
        yield from _config_rows(classes, section, inner)


def described_fields(node: ast.ClassDef) -> Iterator[tuple[str, str, str | None, str]]:
    """(name, type, default, meaning) of each field; the meaning is the string literal under it."""
    for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            meaning = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                meaning = inspect.cleandoc(str(after.value.value))
            default = None if statement.value is None else ast.unparse(statement.value)
            yield statement.target.id, ast.unparse(statement.annotation), default, meaning


def metrics_page() -> str:
    """The table of numbers and the events they come from."""
    rows = "\n".join(f"| `{m.name}` | {m.unit} | `{m.source}` | {_cell(m.meaning)} |" for m in METRICS)
    counted = "\n".join(f"| `{name}` | {kind} | {_cell(meaning)} |" for name, kind, meaning in Metrics().names())
    names = {cls.__name__: kind for kind, cls in kinds.KINDS.items()}
    parts = [
        "# Numbers and events\n\n## Numbers of a run\n\nEvery number of a run has one name and one unit.\n\n"
        f"| name | unit | event field | meaning |\n|---|---|---|---|\n{rows}\n",
        "## Numbers of an endpoint\n\n`/metrics` of the endpoint, with an API key:\n\n"
        f"| name | kind | meaning |\n|---|---|---|\n{counted}\n",
        "## Events\n\nA run keeps its events as JSON lines: `schema`, `time_s`, `kind`, `fields`. "
        "Floats that JSON has no number for are the strings `NaN`, `Infinity`, `-Infinity`.\n",
    ]
    for node in _tree(kinds).body:
        if isinstance(node, ast.ClassDef) and node.name in names:
            fields = "\n".join(
                f"| `{name}` | {_type(hint)} | {_cell(meaning)} |" for name, hint, _, meaning in described_fields(node)
            )
            about = ast.get_docstring(node) or ""
            parts.append(
                f"### `{names[node.name]}`\n\n{about}\n\n| field | type | meaning |\n|---|---|---|\n{fields}\n"
            )
    return "\n".join(parts)


def cli_page() -> str:
    """Every verb, its arguments and its options."""
    head = "# Command line\n\n"
    if importlib.util.find_spec("farspan.cli.main") is None:
        return f"{head}This build of farspan has no command line.\n"
    import typer

    from farspan.cli.main import app

    return head + "\n".join(_command(typer.main.get_command(app), "farspan"))


def _command(command: Any, path: str) -> Iterator[str]:
    subcommands = getattr(command, "commands", {})
    if subcommands:
        yield f"{command.help or ''}\n"
    else:
        yield f"## `{path}`\n\n{command.help or ''}\n"
        visible = [p for p in command.params if not getattr(p, "hidden", False) and p.name != "help"]
        if visible:
            yield "| argument or option | default | meaning |\n|---|---|---|"
            yield from (_parameter_row(p) for p in visible)
            yield ""
    for name, sub in subcommands.items():
        if not sub.hidden:
            yield from _command(sub, f"{path} {name}")


def _parameter_row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        shown = f"`{parameter.metavar or parameter.name.upper()}`"
    else:
        shown = ", ".join(f"`{option}`" for option in [*parameter.opts, *parameter.secondary_opts])
    value = parameter.default
    default = "" if value is None else _default(repr(value))
    return f"| {shown} | {'required' if parameter.required else default} | {_cell(parameter.help or '')} |"


def decisions() -> str:
    """The index of docs/decisions."""
    rows = []
    for path in sorted((DOCS / "decisions").glob("[0-9]*.md")):
        title = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        rows.append(f"- [{title}](../decisions/{path.name})")
    return "# Decisions\n\nWhy things are as they are: context, choice, price.\n\n" + "\n".join(rows) + "\n"


def _tree(module: ModuleType) -> ast.Module:
    return ast.parse(inspect.getsource(module))


def _type(hint: str) -> str:
    for kind in ("str", "int", "float"):
        hint = hint.replace(f"{kind} | None", f"{kind}, or none")
    # A bar would end the cell.
    return hint.replace(" | ", " or ").replace("[", "\\[")


def _default(default: str | None) -> str:
    if default is None or default == "MISSING":
        return "required"
    if default.startswith("field(default_factory="):
        return {"dict": "`{}`", "list": "`[]`"}.get(default.removeprefix("field(default_factory=")[:-1], "")
    return {"None": "none", "True": "`true`", "False": "`false`"}.get(default, f"`{default.strip(QUOTES)}`")


def _cell(text: str) -> str:
    # A bar would end the cell.
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    for written in write_reference():
        print(written.relative_to(DOCS.parent))
