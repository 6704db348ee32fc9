"""The README's cluster in six commands, run as they stand there, by a new user on a machine of its own.

The machine is a host out of namespaces: nothing else listens on its ports, nobody was there before, and what is left
behind is seen. The environment is this checkout's; without one `make setup` would make it from the network.
"""

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.hosts import Host, hosts

REPOSITORY = Path(__file__).resolve().parents[2]
_COMMAND_S = 240.0
_TITLE = "## A cluster on this machine, in six commands"


def printed() -> tuple[list[str], str]:
    """The commands of the README's section, and the one that ends it all."""
    section = (REPOSITORY / "README.md").read_text(encoding="utf-8").partition(_TITLE)[2].partition("\n## ")[0]
    block = section.partition("```console\n")[2].partition("```")[0]
    (end,) = re.findall(r"`([^`\n]*cluster down[^`\n]*)`", section)
    return [line.removeprefix("$ ") for line in block.splitlines()], end


class Stranger:
    """A clone of this checkout and an empty home, on one host."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host, self.home, self._clone = host, folder / "home", folder / "clone"
        self.home.mkdir()
        self._clone.mkdir()
        # What git knows, and the environment; what is written lands in the clone.
        for entry in [*_known(), ".venv"]:
            (self._clone / entry).symlink_to(REPOSITORY / entry)

    def types(self, line: str) -> str:
        """Everything a command said; it must succeed."""
        begin = time.monotonic()
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("AWS_", "RAY_", "PYTHON", "OMP_"))}
        answer = subprocess.run(
            self.host.command("bash", "-c", f"cd {self._clone} && {line}"),
            env={**kept, "HOME": str(self.home), "COLUMNS": "200"}, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=_COMMAND_S, check=False,
        )  # fmt: skip
        print(f"{time.monotonic() - begin:.0f} s: {line}")
        assert answer.returncode == 0, f"{line}\n{answer.stdout}{answer.stderr}"
        return answer.stdout


def _known() -> list[str]:
    """Files and folders at the top of the checkout."""
    listed = subprocess.run(
        ["git", "ls-tree", "--name-only", "HEAD"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return listed.stdout.split()


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    ready = ["make", "--question", "setup"]
    if subprocess.run(ready, cwd=REPOSITORY, capture_output=True, timeout=60, check=False).returncode != 0:
        pytest.skip("the checkout's own .venv is not made, or older than the lock: run make setup")
    folder = Path(tempfile.mkdtemp(prefix="farspan-stranger-", dir="/var/tmp"))
    try:
        with hosts(1, shm_mb=2048) as (host,):
            yield Stranger(host, folder)
    finally:
        shutil.rmtree(folder)


def test_the_readme_prints_at_most_six_commands() -> None:
    commands, end = printed()
    assert 1 <= len(commands) <= 6
    assert all(command.startswith((".venv/bin/farspan ", "make ")) for command in [*commands, end])


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_six_commands_of_the_readme_lead_to_a_cluster_with_a_job_and_an_endpoint_and_one_ends_it(
    stranger: Stranger,
) -> None:
    commands, end = printed()
    said = {command: stranger.types(command) for command in commands}
    told = {words: text for command, text in said.items() for words in re.findall(r"farspan (\w+(?: up)?)", command)}
    assert "a head and 2 workers on this machine" in told["cluster up"]
    assert "step    10/10" in told["train"]
    assert "model published: " in told["train"]
    assert "ready: http://127.0.0.1:8000/v1  model model" in told["serve"]
    assert told["chat"].strip() != ""

    status = stranger.types(".venv/bin/farspan cluster status --on here")
    assert [status.count(word) for word in ("head", "worker", "runs")] == [1, 2, 3]
    jobs = stranger.types(".venv/bin/farspan jobs list")
    assert "SUCCEEDED" in jobs
    assert "RUNNING" in jobs
    token = stranger.home / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    refused = stranger.types("curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8265/api/jobs/")
    assert refused == "401"
    # A second `up` finds it running.
    assert "a head and 2 workers" in stranger.types(next(line for line in commands if "cluster up" in line))

    assert stranger.types(end) == "down: farspan, 3 nodes\n"
    assert stranger.types(end) == "no node of farspan runs here\n"
    # The host's first process waits for nobody: what has ended stays listed there.
    left = [line for line in stranger.types("ps -eo args --no-headers").splitlines() if "<defunct>" not in line]
    assert [line for line in left if "ray" in line or "farspan." in line] == []
    assert stranger.types("ls -d /tmp/farspan-* 2> /dev/null | wc -l").strip() == "0"
