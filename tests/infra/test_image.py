"""The image is pinned, runs as a user, and takes nothing with it that it does not need. It was not built here."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = (REPOSITORY / "infra" / "docker" / "Dockerfile").read_text(encoding="utf-8")
LOCK = dict(
    line.split("==") for line in (REPOSITORY / "requirements.lock").read_text(encoding="utf-8").splitlines() if line
)


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments), continued lines joined, comments left out."""
    lines = "\n".join(line for line in TEXT.splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", "", lines)
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for word, rest in instructions():
        if word == "FROM":
            name = rest.split(" AS ")[1]
            found[name] = []
        elif name:
            found[name].append((word, rest))
    return found


def test_the_base_is_one_exact_version() -> None:
    defaults = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG" and "=" in rest)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", defaults["BASE"])
    bases = {rest.split(" AS ")[0] for word, rest in instructions() if word == "FROM"}
    assert bases == {"${BASE}", "system"}


def test_both_images_run_as_a_user_with_a_number() -> None:
    for name in ("cpu", "gpu"):
        assert [rest for word, rest in stages()[name] if word == "USER"] == ["1000:1000"]
        assert stages()[name][-1][0] == "USER"


def test_every_package_is_held_to_the_lock() -> None:
    installs = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    assert len(installs) == 3
    for install in installs:
        assert "--constraint /opt/farspan/requirements.lock" in install or "hatchling==" in install
        for name, version in re.findall(r"\b(torch|hatchling)==([\d.]+\d)", install):
            assert version == LOCK[name]


def test_nothing_is_fetched_from_a_bare_address_and_nothing_secret_is_asked_for() -> None:
    for word, rest in instructions():
        assert word != "ADD"
        assert "curl" not in rest
        assert not re.search(r"wget\s+http", rest)
        assert not (word in ("ARG", "ENV") and re.search(r"TOKEN|SECRET|PASSWORD|_KEY", rest))
    addresses = set(re.findall(r"https?://[\w./-]+", TEXT))
    assert addresses == {"https://download.pytorch.org/whl/cpu"}


def test_only_what_is_copied_is_sent_to_the_builder() -> None:
    ignored = (REPOSITORY / "infra" / "docker" / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    assert ignored[0] == "*"
    sent = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {
        source
        for word, rest in instructions()
        if word == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    }
    assert copied == sent
    assert [path for path in sent if not (REPOSITORY / path).exists()] == []
