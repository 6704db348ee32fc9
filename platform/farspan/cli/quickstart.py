"""`farspan quickstart`: a thin chain of the real commands, printed as it goes.

Every process started here is stopped here, also by an error, Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from rich.console import Console

from farspan.cli.configs import shipped_config
from farspan.cli.proof import prove_answers
from farspan.cli.record import EVENTS_FILE, machine_facts
from farspan.config.load import load_config
from farspan.config.schema import CorpusConfig, RunConfig
from farspan.errors import ClusterError, FarspanError
from farspan.telemetry.events import EventLog, RequestServed, read_events
from farspan.telemetry.report import write_report

_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 60.0


def run_quickstart(folder: str, overrides: list[str], *, fresh: bool) -> None:
    """Run the whole path under `folder`; `overrides` go to `farspan train`."""
    console = Console(highlight=False, soft_wrap=True)
    root = Path(folder).absolute()
    corpus, run = root / "corpus", root / "run"
    # Refuse a bad override before minutes of work, not after.
    load_config(RunConfig, shipped_config("quickstart.yaml"), overrides)
    load_config(CorpusConfig, shipped_config("corpus_quickstart.yaml"), [])
    if fresh:
        shutil.rmtree(run, ignore_errors=True)
    started = time.monotonic()
    _headline(console, "1. a corpus from Python's own source files")
    _run(console, ["data", "build", shipped_config("corpus_quickstart.yaml"), f"output={corpus}"])
    _headline(console, "2. training: two processes share each 8192-token sequence")
    data = [f"data.corpus={corpus}", f"output={run}"]
    _run(console, ["train", shipped_config("quickstart.yaml"), *data, *overrides])
    _headline(console, "3. serving: a prefill worker, a decode worker, KV moved between them")
    port, key_file = _free_port(), root / "api_key"
    serve = ["serve", shipped_config("serve_quickstart.yaml"), f"model={run / 'model'}", f"port={port}"]
    _write_key(key_file)
    with _service(console, [*serve, f"api_key_file={key_file}"], f"http://127.0.0.1:{port}"):
        _headline(console, "4. the openai client streams; transformers' generate is the judge")
        answers = prove_answers(f"http://127.0.0.1:{port}/v1", key_file, run / "model", corpus, console)
    _headline(console, "5. the report")
    report = _report(run, answers)
    console.print(f"report: {report}", markup=False)
    console.print(f"done in {time.monotonic() - started:.0f} s", style="bold")


def _report(run: Path, answers: list[RequestServed]) -> Path:
    from farspan.models.checkpoint import open_config
    from farspan.plan.facts import model_facts

    log = run / EVENTS_FILE
    with EventLog(log) as opened:
        for answer in answers:
            opened.append(answer)
    model = model_facts(open_config(run / "model"))
    facts = {"model": f"{model.name}, {model.num_parameters / 1e6:.1f} M parameters", **machine_facts()}
    return write_report(read_events(log).events, run / "report.html", title="farspan quickstart", facts=facts)


def _headline(console: Console, text: str) -> None:
    console.print(f"\n{text}", style="bold")


def _command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "farspan.cli.main", *arguments]


def _run(console: Console, arguments: list[str]) -> None:
    console.print(f"$ farspan {shlex.join(arguments)}", style="cyan", markup=False)
    process = subprocess.Popen(_command(arguments))
    try:
        code = process.wait()
    finally:
        _stop(process)
    if code == 130:
        raise KeyboardInterrupt
    if code != 0:
        raise FarspanError(f"`farspan {arguments[0]}` ended with exit code {code}; its message is above")


@contextmanager
def _service(console: Console, arguments: list[str], url: str) -> Iterator[None]:
    """`farspan serve` for the length of a block, ready when the block begins."""
    console.print(f"$ farspan {shlex.join(arguments)} &", style="cyan", markup=False)
    process = subprocess.Popen(_command(arguments))
    try:
        _wait_ready(process, url)
        yield
    finally:
        _stop(process)


def _wait_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ClusterError(f"`farspan serve` ended with exit code {process.returncode}; its message is above")
        try:
            if httpx.get(f"{url}/ready", timeout=5.0).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.25)
    raise ClusterError(f"{url} was not ready within {_START_TIMEOUT_S:.0f} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt, wait, and only then kill: the child stops its own Ray on the way out."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout=10)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _write_key(path: Path) -> None:
    import secrets

    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(f"{secrets.token_urlsafe(32)}\n")
