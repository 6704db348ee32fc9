"""The report of a run: written when the run ends, however it ends, and again by `farspan report`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from farspan.cli.record import machine_facts, now, recorded_log
from farspan.errors import FarspanError, UnreachableError
from farspan.storage.door import open_store
from farspan.storage.paths import LocalPlace, absolute_uri, join_uri, parse_uri
from farspan.telemetry.events import Event, EventLog, RunFailed, read_events
from farspan.telemetry.summary import summarize

REPORT_FILE = "report.html"


@contextmanager
def reported(log: EventLog, output: str) -> Iterator[None]:
    """Around a run: at its end, also by an error or an interrupt, its report is written and its place is said.

    An error goes into the record first. A report that cannot be written is one sentence, and changes nothing else.
    """
    try:
        yield
    except BaseException as problem:
        with suppress(UnreachableError):
            log.append(RunFailed(reason=_reason(problem)))
        raise
    finally:
        _report_end(log.path, output)


def run_report(run: str, out: str | None) -> None:
    """Write the report of the run at `run` from its record, into its folder or to the file `out`."""
    uri = absolute_uri(run)
    console = Console(highlight=False, soft_wrap=True)
    with recorded_log(uri) as log:
        record = read_events(log)
        if record.warning is not None:
            Console(stderr=True, highlight=False, soft_wrap=True).print(record.warning, markup=False)
        facts = {"run": uri, "written": now()}
        if out is not None:
            place = str(_write(record.events, Path(out).expanduser().absolute(), facts))
        else:
            place = _place(_write(record.events, log.with_name(REPORT_FILE), facts), uri)
    console.print(f"report: {place}", markup=False)


def _reason(problem: BaseException) -> str:
    if isinstance(problem, FarspanError):
        return str(problem)
    if isinstance(problem, KeyboardInterrupt):
        return "interrupted"
    return f"{type(problem).__name__}: {problem}"


def _report_end(log: Path, output: str) -> None:
    console = Console(highlight=False, soft_wrap=True)
    try:
        events = read_events(log).events
        if not events:
            return
        place = _place(_write(events, log.with_name(REPORT_FILE), {"run": output, **machine_facts()}), output)
    except Exception as problem:
        # Whatever it is, the run's own end matters more.
        text = f"no report was written: {_reason(problem)}; `farspan report {output}` tries again"
        console.print(text, markup=False)
        return
    console.print(f"report: {place}", markup=False)


def _write(events: Sequence[Event], out: Path, facts: Mapping[str, str]) -> Path:
    # What draws its plots is no concern of a run that begins.
    from farspan.telemetry.report import write_report

    summary = summarize(events)
    said = dict(line.partition(": ")[::2] for line in (summary.started.plan if summary.started else "").splitlines())
    model = ", ".join(part for part in (summary.run.model, said.get("model", "")) if part)
    return write_report(events, out, summary.run.name or "run", {**({"model": model} if model else {}), **facts})


def _place(report: Path, output: str) -> str:
    """Where a reader finds `report`: a run in an object store gets it there, beside its record."""
    if isinstance(parse_uri(output), LocalPlace):
        return str(report)
    open_store(output).upload(report, REPORT_FILE)
    return join_uri(output, REPORT_FILE)
