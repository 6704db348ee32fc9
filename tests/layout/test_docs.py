"""The documentation is about this code: files exist, commands parse, keys are known, and the site builds alone."""

import dataclasses
import importlib.util
import re
import shlex
import subprocess
import sys
import typing
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer
import yaml

from farspan.cli.configs import apart
from farspan.config import schema
from farspan.config.cluster import ClusterSpec
from farspan.config.load import load_config
from farspan.errors import ConfigError, FarspanError
from farspan.telemetry import kinds

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
ROOTS = ("platform", "kernels", "serve", "jobs")
PAGES = sorted(p for p in DOCS.rglob("*.md") if p.parent.name not in ("reference", "decisions"))
SCHEMAS = {"train": schema.RunConfig, "plan": schema.RunConfig, "serve": schema.ServeConfig,
           "data": schema.CorpusConfig}  # fmt: skip


def walks() -> list[str]:
    """Every file named in the two walks of docs/architecture.md."""
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert text.count("\n## Walk ") == 2
    return sorted(set(re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.py)`", text[text.index("\n## Walk A") :])))


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every `$ farspan ...` in the documentation."""
    found = []
    for page in PAGES:
        for line in re.findall(r"^\$ (farspan .*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            found.append((page.name, line))
    return found


def test_the_walks_name_enough_files_to_be_walks() -> None:
    assert len(walks()) >= 25


@pytest.mark.parametrize("file", walks())
def test_a_file_named_in_a_walk_exists_in_one_root(file: str) -> None:
    assert [root for root in ROOTS if (REPOSITORY / root / "farspan" / file).is_file()] != []


def test_every_room_of_the_code_is_on_the_architecture_page_and_in_its_picture() -> None:
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    picture = (DOCS / "assets" / "house.svg").read_text(encoding="utf-8")
    rooms = {
        entry.name
        for root in ROOTS
        for entry in (REPOSITORY / root / "farspan").iterdir()
        if entry.is_dir() and entry.name != "__pycache__"
    }
    assert {room for room in rooms if f"| `{room}` |" not in page} == set()
    assert {room for room in rooms if f">{room}</text>" not in picture} == set()


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_in_the_docs_is_one_that_farspan_parses(page: str, line: str) -> None:
    from farspan.cli.main import app

    command: typing.Any = typer.main.get_command(app)
    words, verb = shlex.split(line)[1:], "farspan"
    while hasattr(command, "commands"):
        verb = words.pop(0)
        assert verb in command.commands, f"{page}: no verb {verb}"
        command = command.commands[verb]
    context = command.make_context(verb, words)
    config, overrides = context.params.get("config"), context.params.get("overrides")
    configs = [] if config is None else [config]
    if "configs" in context.params:
        configs, overrides = apart(context.params["configs"])
    for config in configs:
        file = REPOSITORY / config
        assert file.is_file(), f"{page}: no {config}"
        wanted = SCHEMAS["data" if verb == "build" else verb]
        refusal = _refusal(wanted, str(file), list(overrides or []))
        shown = (DOCS / "how-to" / "errors.md").read_text(encoding="utf-8")
        assert refusal is None or f"error: {refusal}" in shown, f"{page}: {refusal}"


def _refusal(wanted: type, file: str, overrides: list[str]) -> str | None:
    try:
        load_config(wanted, file, overrides)
    except ConfigError as problem:
        return str(problem)
    return None


@pytest.mark.parametrize("page", [p for p in PAGES if "```yaml" in p.read_text(encoding="utf-8")], ids=lambda p: p.name)
def test_a_yaml_example_has_only_known_keys(page: Path, tmp_path: Path) -> None:
    configs = {"data.md": schema.CorpusConfig, "serve.md": schema.ServeConfig, "clusters.md": ClusterSpec}
    wanted = configs.get(page.name, schema.RunConfig)
    required = {schema.RunConfig: ["data.corpus=x"], schema.ServeConfig: ["model=x"]}
    # Examples of a cluster are added to a copy of the committed spec.
    before = (REPOSITORY / "infra" / "cluster.yaml").read_text(encoding="utf-8") if wanted is ClusterSpec else ""
    for example in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        file = tmp_path / "example.yaml"
        file.write_text(before + example, encoding="utf-8")
        load_config(wanted, str(file), required.get(wanted, []))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_a_key_or_an_event_named_in_the_docs_exists(page: Path) -> None:
    known = {*_keys(schema.RunConfig), *_keys(schema.ServeConfig), *_keys(schema.CorpusConfig), *_keys(ClusterSpec)}
    sections = "|".join(sorted({key.split(".")[0] for key in known if "." in key}))
    named = re.findall(rf"`((?:{sections})\.[a-z_]+)(?:=[^`]*)?`", page.read_text(encoding="utf-8"))
    assert {key for key in named if key not in known and not key.endswith((".py", ".md", ".json"))} == set()


def _keys(config: type, prefix: str = "") -> set[str]:
    found = set()
    for name, hint in typing.get_type_hints(config).items():
        found |= _keys(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {f"{prefix}{name}"}
    return found


def test_every_error_is_on_the_errors_page() -> None:
    page = (DOCS / "how-to" / "errors.md").read_text(encoding="utf-8")
    bases = {"FarspanError", "StorageError"}
    names, pending = set(), [FarspanError]
    while pending:
        error = pending.pop()
        if error.__module__ == "farspan.errors":
            names.add(error.__name__)
            pending += error.__subclasses__()
    assert {name for name in names - bases if f"`{name}`" not in page} == set()


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"[\w/-]+\.md", (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2])
    assert {str(p.relative_to(DOCS)) for p in PAGES} == {name for name in listed if not name.startswith("reference/")}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=REPOSITORY, check=True, timeout=300,
    )  # fmt: skip
    return folder


class _Fetches(HTMLParser):
    """Addresses a browser would fetch by itself."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {"link": ("href",), "a": ()}.get(tag, ("src", "href", "data", "srcset"))
        self.addresses += [value for name, value in attrs if name in names and value]


def test_the_site_builds_strictly_and_asks_no_other_site_for_anything(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        fetched = _Fetches(page.read_text(encoding="utf-8")).addresses
        assert [address for address in fetched if re.match(r"(https?:)?//", address)] == [], page.name


def test_the_reference_shows_every_key_every_event_and_every_decision(site: Path) -> None:
    config = (site / "reference" / "config" / "index.html").read_text(encoding="utf-8")
    for key in _keys(schema.RunConfig) | _keys(schema.ServeConfig) | _keys(schema.CorpusConfig) | _keys(ClusterSpec):
        assert f"<code>{key}</code>" in config, key
    metrics = (site / "reference" / "metrics" / "index.html").read_text(encoding="utf-8")
    for kind, cls in kinds.KINDS.items():
        assert f'id="{kind}"' in metrics
        for field in dataclasses.fields(cls):
            assert f"<code>{field.name}</code>" in metrics
    decisions = (site / "reference" / "decisions" / "index.html").read_text(encoding="utf-8")
    for path in (DOCS / "decisions").glob("[0-9]*.md"):
        assert f"decisions/{path.stem}/" in decisions


def test_every_key_that_a_user_can_set_says_what_it_means() -> None:
    specification = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert specification is not None
    assert specification.loader is not None
    reference = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(reference)
    rows = re.findall(r"^\| `([a-z_.0-9]+)` \|.*\| (.*) \|$", reference.config_page(), flags=re.MULTILINE)
    assert len(rows) >= 60
    assert [key for key, meaning in rows if not meaning.strip()] == []


def test_the_issue_forms_and_hooks_are_yaml_that_says_what_it_must() -> None:
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert {repo["repo"] for repo in hooks["repos"]} == {"local"}
    for form in sorted((REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml")):
        content = yaml.safe_load(form.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= set(content), form.name
        ids = [part["id"] for part in content["body"] if part["type"] != "markdown"]
        assert len(ids) == len(set(ids)), form.name
