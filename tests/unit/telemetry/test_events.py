"""The event log gives back what was written, and says so when it cannot."""

import dataclasses
import json
import math
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farspan.errors import CorruptDataError, NotFoundError, UnreachableError
from farspan.telemetry import kinds
from farspan.telemetry.events import Event, EventLog, Note, RequestServed, StepReport, from_json, read_events, to_json
from farspan.telemetry.names import METRICS

STEP = StepReport(
    step=1, loss=9.0102, learning_rate=3e-5, grad_norm=1.25, tokens=8192, num_labels=8190, step_s=2.5,
    tokens_per_s=3276.8, peak_memory_bytes=1 << 30, bytes_sent=50331648,
)  # fmt: skip


def strategy_of(hint: object) -> st.SearchStrategy:
    if isinstance(hint, typing.types.GenericAlias):  # type: ignore[attr-defined]
        return st.lists(strategy_of(hint.__args__[0]), max_size=4).map(tuple)
    plain = {int: st.integers(), float: st.floats(), str: st.text(), bool: st.booleans()}
    return plain[hint]  # type: ignore[index]


def bodies() -> st.SearchStrategy:
    return st.one_of(
        [
            st.builds(cls, **{name: strategy_of(hint) for name, hint in typing.get_type_hints(cls).items()})
            for cls in kinds.KINDS.values()
        ]
    )


def bits(value: object) -> object:
    """Equal exactly when the values are the same, NaN and -0.0 included."""
    if dataclasses.is_dataclass(value):
        return (type(value), *(bits(getattr(value, f.name)) for f in dataclasses.fields(value)))
    if isinstance(value, tuple):
        return tuple(bits(item) for item in value)
    return (type(value), "nan" if value != value else repr(value))


@given(time_s=st.floats(allow_nan=False, allow_infinity=False), body=bodies())
def test_every_event_equals_itself_after_json(time_s: float, body: kinds.EventBody) -> None:
    event = Event(time_s, body)
    line = to_json(event)
    assert "\n" not in line
    assert bits(from_json(line)) == bits(event)


def test_the_written_line_is_standard_json_also_for_nan() -> None:
    line = to_json(Event(1.0, dataclasses.replace(STEP, loss=math.nan, grad_norm=-math.inf)))
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (record["fields"]["loss"], record["fields"]["grad_norm"]) == ("NaN", "-Infinity")


def test_a_record_from_before_a_number_was_added_is_still_read() -> None:
    record = json.loads(to_json(Event(1.0, STEP)))
    for name in ("device_bytes", "exposed_s", "samples"):
        del record["fields"][name]
    assert from_json(json.dumps(record)) == Event(1.0, STEP)
    del record["fields"]["loss"]
    with pytest.raises(CorruptDataError, match="exactly the fields"):
        from_json(json.dumps(record))


def test_a_log_gives_back_what_was_appended_also_over_two_writers(tmp_path: Path) -> None:
    path = tmp_path / "run" / "events.jsonl"
    clock = iter([1.5, 2.5, 3.5])
    with EventLog(path, clock=lambda: next(clock)) as log:
        written = [log.append(STEP), log.append(Note(text="zwei\nZeilen \u2028 ☃"))]
    with EventLog(path, clock=lambda: next(clock)) as log:
        written.append(log.append(Note(text="again")))
    file = read_events(path)
    assert list(file.events) == written
    assert [event.time_s for event in file.events] == [1.5, 2.5, 3.5]
    assert file.warning is None


def test_a_log_survives_a_writer_killed_at_any_byte_of_its_last_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        first, _ = log.append(STEP), log.append(Note(text="é"))
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for end in range(start + 1, len(whole)):
        path.write_bytes(whole[:end])
        file = read_events(path)
        assert (file.events, file.torn_bytes) == ((first,), end - start)
        assert file.warning is not None
        assert f"{end - start} bytes" in file.warning


def test_the_next_writer_survives_a_torn_line_and_notes_it(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        first = log.append(STEP)
    with path.open("ab") as file:
        file.write(b'{"schema":1,"time')
    with EventLog(path) as log:
        last = log.append(Note(text="after"))
    events = read_events(path).events
    assert (events[0], events[2], len(events)) == (first, last, 3)
    assert isinstance(events[1].body, Note)
    assert "17 bytes" in events[1].body.text


def _with(**changes: object) -> str:
    record = json.loads(to_json(Event(1.0, STEP)))
    record.update(changes)
    return json.dumps(record)


def _with_field(name: str, value: object) -> str:
    record = json.loads(to_json(Event(1.0, STEP)))
    record["fields"][name] = value
    return json.dumps(record)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "not a line of JSON"),
        ("{", "not a line of JSON"),
        ("[]", "must be an object"),
        (_with(more=1), "must be an object"),
        (_with(schema=2), "schema 2"),
        (_with(schema=True), "schema True"),
        (_with(kind="stepp"), "unknown kind 'stepp'"),
        (_with(kind=["step"]), "unknown kind"),
        (_with(time_s="soon"), "time_s"),
        (_with(fields={"step": 1}), "exactly the fields"),
        (_with_field("extra", 1), "exactly the fields"),
        (_with_field("step", 1.5), "step: must be int"),
        (_with_field("step", True), "step: must be int"),
        (_with_field("loss", "low"), "loss: must be float"),
        (to_json(Event(1.0, STEP)).replace("9.0102", "NaN"), "loss: must be float"),
        (to_json(Event(1.0, STEP)).replace("9.0102", "1e999"), "loss: must be float"),
    ],
)
def test_a_finished_line_that_is_no_event_is_refused_with_its_place(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(f"{to_json(Event(1.0, STEP))}\n{line}\n{to_json(Event(2.0, STEP))}\n")
    with pytest.raises(CorruptDataError, match=reason) as caught:
        read_events(path)
    assert caught.value.uri.startswith(f"{path}:2")


def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(CorruptDataError, match="UTF-8"):
        read_events(path)


def test_a_missing_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"nothing\.jsonl"):
        read_events(tmp_path / "nothing.jsonl")


def test_a_second_writer_of_one_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path), pytest.raises(UnreachableError, match="another process"):
        EventLog(path)


def test_a_log_in_a_place_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnreachableError, match="cannot be opened"):
        EventLog(tmp_path / "file" / "events.jsonl")


def test_a_full_disk_leaves_no_half_event_behind(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    path = tmp_path / "events.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGXFSZ, handler))
    with EventLog(path) as log:
        first = log.append(STEP)
        room = path.stat().st_size + 20
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            with pytest.raises(UnreachableError, match="20 of"):
                log.append(Note(text="x" * 100))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        second = log.append(Note(text="there is room again"))
    assert read_events(path).events == (first, second)


def test_every_number_of_every_event_has_one_name_and_one_unit() -> None:
    numeric = {
        f"{kind}.{name}"
        for kind, cls in kinds.KINDS.items()
        for name, hint in typing.get_type_hints(cls).items()
        if hint in (int, float, tuple[float, ...])
    }
    assert {m.source for m in METRICS} == numeric
    assert len({m.name for m in METRICS}) == len(METRICS)
    for m in METRICS:
        assert m.name.endswith("_seconds") == (m.unit == "s"), m.name
        assert m.name.endswith("_bytes") == (m.unit == "bytes"), m.name


def test_a_request_keeps_its_gaps_in_order() -> None:
    served = RequestServed(
        request_id="r", prompt_tokens=3, output_tokens=3, ttft_s=0.5, inter_token_s=(0.2, 0.1), kv_bytes=9,
        transfer_s=0.0, transport="nixl", recovered=True,
    )  # fmt: skip
    assert from_json(to_json(Event(0.0, served))).body == served
