"""The run report says everything it was told, to everybody, and nothing else."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest

from farspan.errors import UnreachableError
from farspan.telemetry.events import (
    CheckpointPublished,
    Event,
    EventBody,
    LayoutProbed,
    Note,
    PlanPredicted,
    PlanSteppedDown,
    RequestServed,
    RunFailed,
    RunFinished,
    RunPreempted,
    RunResized,
    RunRestarted,
    RunStarted,
    StepReport,
    to_json,
)
from farspan.telemetry.kinds import KINDS
from farspan.telemetry.plots import Plot, draw
from farspan.telemetry.report import TEMPLATE, write_report
from farspan.telemetry.summary import percentile, summarize
from farspan.telemetry.units import byte_size, count, duration, number

TRAIN_PLOTS = {"plot-loss", "plot-tokens_per_s", "plot-peak_memory_bytes"}
# Only where there is something to show.
TIER_PLOTS = {
    f"plot-{name}"
    for name in ("exposed_s", "device_bytes", "dram_bytes", "cxl_bytes", "emulated_cxl_bytes", "nvme_bytes")
}
SERVE_PLOTS = {"plot-ttft_s", "plot-inter_token_s", "plot-transfer_s"}
HOSTILE = "</pre></title><script>alert('x')</script><img src=x onerror=y>&amp;\"'"
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what a reader and a browser would see."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.tiles: list[tuple[str, ...]] = []
        self._parts: list[str] = []
        self._in_part = False
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"an attribute stands twice in <{tag}>"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr" or dict(attrs).get("class") == "tile":
            self._parts = []
        if tag == "td" or dict(attrs).get("class") in ("label", "value", "remark"):
            self._in_part = True
            self._parts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag
        if tag == "tr":
            self.rows.append(self._parts)
        if tag == "div" and self._in_part and len(self._parts) == 3:
            self.tiles.append(tuple(self._parts))
        if tag in ("td", "div"):
            self._in_part = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_part:
            self._parts[-1] += data

    def ids(self) -> list[str]:
        return [attrs["id"] or "" for _, attrs in self.tags if "id" in attrs]

    def plots(self) -> set[str]:
        labels = [attrs.get("aria-labelledby") for tag, attrs in self.tags if tag == "svg"]
        return {(label or "").split()[0].removesuffix("-title") for label in labels}


def step(i: int, loss: float) -> StepReport:
    return StepReport(
        step=i, loss=loss, learning_rate=3.0625e-4, grad_norm=1.5078125, tokens=8192, num_labels=8179, step_s=2.7265625,
        tokens_per_s=3004.515625, peak_memory_bytes=1317011456 + i, bytes_sent=50331648,
    )  # fmt: skip


def full(report: StepReport) -> StepReport:
    """The same step of two ranks that hold something everywhere and wait for each other."""
    return dataclasses.replace(
        report, device_bytes=5 << 30, dram_bytes=4 << 30, cxl_bytes=3 << 30, emulated_cxl_bytes=2 << 30,
        nvme_bytes=1 << 30, exposed_s=0.3408203125, exposed_max_s=0.681640625,
    )  # fmt: skip


def served(i: int, gaps: tuple[float, ...]) -> RequestServed:
    return RequestServed(
        request_id=f"chat-{i}", prompt_tokens=2210 + i, output_tokens=len(gaps) + 1, ttft_s=0.9340625 + i,
        inter_token_s=gaps, kv_bytes=27156480 + i, transfer_s=0.00642578125, transport="nixl", recovered=i == 2,
    )  # fmt: skip


CONFIG = "name: quickstart\nseed: 77\nparallel: {workers: 2}\nresources: {price_per_gpu_hour: 3.6}\n"


def plain_run() -> list[Event]:
    """Eight steps, two requests."""
    bodies = [
        RunStarted(config=CONFIG, plan="2 workers, sp 2"),
        *(step(i, 9.0 - i / 8) for i in range(1, 9)),
        CheckpointPublished(step=8, uri="s3://bucket/run/step-8", seconds=1.828125, bytes=214000123),
        RunFinished(steps=8, tokens=65536, seconds=171.3125),
        served(1, (0.02109375, 0.02265625, 0.0625)),
        served(2, ()),
        Note(text="all equal"),
    ]
    return timed(bodies)


def whole_run() -> list[Event]:
    """Three starts of one run, to which everything happens that can happen to a run."""
    bodies = [
        RunStarted(config=CONFIG, plan="2 workers, sp 2"),
        PlanPredicted(step_s=9.0, device_bytes=1 << 40),
        step(1, 8.875),
        RunPreempted(step=1, reason="SIGTERM"),
        RunStarted(config=CONFIG, plan="2 workers, sp 2"),
        RunFailed(reason="rank 1: the disk is full"),
        RunStarted(config=CONFIG, plan="2 workers, sp 2"),
        PlanPredicted(step_s=3.0, device_bytes=1 << 30),
        *(step(i, 9.0 - i / 8) for i in (2, 3)),
        LayoutProbed(step=3, seconds=0.5, failed=(), passed=("loss equal", "gradients equal")),
        LayoutProbed(step=3, seconds=0.5, failed=("logits differ by 0.25",), passed=("loss equal",)),
        PlanSteppedDown(step=4, reason="rank 0 ran out of memory", change="loss tiles 4096 -> 2048 tokens"),
        *(step(i, 9.0 - i / 8) for i in (4, 5)),
        RunRestarted(step=3, redone=2, reason="worker 1 was killed"),
        RunResized(step=3, workers=1, accumulation=2, reason="no room for 2"),
        *(dataclasses.replace(step(i, 9.0 - i / 8), utilization=0.375) for i in range(4, 9)),
        CheckpointPublished(step=8, uri="s3://bucket/run/step-8", seconds=1.828125, bytes=214000123),
        RunFinished(steps=7, tokens=65536, seconds=171.3125),
        served(1, (0.02109375, 0.02265625, 0.0625)),
        served(2, ()),
        Note(text="all equal"),
    ]
    return timed(bodies)


def timed(bodies: list[EventBody]) -> list[Event]:
    return [Event(1_780_000_000.5 + i, body) for i, body in enumerate(bodies)]


def page_of(tmp_path: Path, events: list[Event], title: str = "a run", facts: dict[str, str] | None = None) -> Page:
    out = write_report(events, tmp_path / "deep" / "report.html", title, facts)
    return Page(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(tmp_path_factory.mktemp("whole"), whole_run())


def test_the_template_is_in_the_package() -> None:
    assert files("farspan.telemetry").joinpath(TEMPLATE).is_file()


def test_the_report_shows_every_number_it_was_given(tmp_path: Path) -> None:
    events = whole_run()
    page = page_of(tmp_path, events, facts={"Model": "llama 12.4 M", "Machine": "2 cores", "Date": "2026-11-21"})
    for event in events:
        assert to_json(event) in page.text
    for text in ("llama 12.4 M", "2 cores", "2026-11-21", "seed: 77", "2 workers, sp 2", "s3://bucket/run/step-8"):
        assert text in page.text
    for request in (b for e in events if isinstance(b := e.body, RequestServed)):
        for shown in (request.request_id, number(request.prompt_tokens), duration(request.ttft_s),
                      byte_size(request.kv_bytes), duration(request.transfer_s)):  # fmt: skip
            assert shown in page.text


def test_a_whole_run_has_every_kind_of_event() -> None:
    assert {type(event.body) for event in whole_run()} == set(KINDS.values())


@pytest.mark.parametrize(
    ("what", "detail"),
    [
        ("Plan", "3.00 s a step predicted · 1.00 GiB on the fullest rank"),
        ("Stopped after step 1", "a checkpoint was published · SIGTERM"),
        ("Run failed", "rank 1: the disk is full"),
        ("Layout probed after step 3", "equal: loss equal; gradients equal · 500 ms"),
        ("Layout probed after step 3", "FAILED: logits differ by 0.25 · 500 ms"),
        ("Step 4 did not fit", "rank 0 ran out of memory · now loss tiles 4096 -> 2048 tokens"),
        ("Restarted after step 3", "2 steps done again · worker 1 was killed"),
        ("1 worker from step 4", "accumulation 2 · no room for 2"),
        ("Checkpoint at step 8", "s3://bucket/run/step-8 · 204 MiB in 1.83 s"),
        ("Run finished", "7 steps · 65\u202f536 tokens · 2 min 51 s"),
        ("Request served", "chat-1 · 4 tokens"),
        ("Note", "all equal"),
    ],
)
def test_everything_that_happened_is_a_sentence_in_the_report(whole_page: Page, what: str, detail: str) -> None:
    assert [what, detail] in [row[1:] for row in whole_page.rows]


@pytest.mark.parametrize(
    ("label", "value", "remark"),
    [
        # The median of steps 2 and 3, which ran as the newest start planned them: 2.727 s.
        ("Predicted step", "+10%", "3.00 s predicted, 2.73 s measured"),
        ("Predicted memory", "-18%", "1.00 GiB predicted, 1.23 GiB measured"),
        # Steps 1 to 3 on two workers and 4 to 8 on one: 11 times 2.727 s at 3.6 an hour, over 8 times 8192 tokens.
        ("Price of a million tokens", "0.458", "at 3.60 for a device's hour; 0.0300 for these steps"),
        ("Throughput", "3.00 k", "tokens/s, 2.19 k per worker"),
        ("Utilization", "37.5%", "of the devices' peak, median step"),
        ("Steps", "8", "21.8 s in steps"),
    ],
)
def test_a_tile_says_its_number_and_where_it_comes_from(whole_page: Page, label: str, value: str, remark: str) -> None:
    assert (label, value, remark) in whole_page.tiles


def test_without_a_price_a_peak_or_a_prediction_nothing_is_said_about_them(tmp_path: Path) -> None:
    events = [dataclasses.replace(plain_run()[0], body=RunStarted(config="name: x", plan="")), *plain_run()[1:]]
    labels = [label for label, _, _ in page_of(tmp_path, events).tiles]
    assert "Throughput" in labels
    assert not [label for label in labels if label.startswith(("Price", "Utilization", "Predicted"))]


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ([RunFinished(steps=1, tokens=1, seconds=60.5)], "Finished in 60.5 s"),
        ([RunPreempted(step=1, reason="SIGTERM")], "Stopped after step 1; the next start goes on from its checkpoint"),
        ([RunPreempted(step=1, reason="room for 2"), RunResized(step=1, workers=2, accumulation=1, reason="room")],
         "Not finished: the record ends after 1 step"),
        ([RunFailed(reason="no room")], "Failed after 1 step: no room"),
        ([RunFinished(steps=1, tokens=1, seconds=60.5), RunFailed(reason="interrupted")], "Finished in 60.5 s"),
        ([RunFailed(reason="no room"), RunStarted(config="", plan="")], "Not finished: the record ends after 1 step"),
        ([], "Not finished: the record ends after 1 step"),
    ],
)  # fmt: skip
def test_the_status_says_how_the_newest_start_ended(tmp_path: Path, ending: list[EventBody], status: str) -> None:
    assert status in page_of(tmp_path, timed([RunStarted(config="", plan=""), step(1, 9.0), *ending])).text


def test_of_a_very_long_run_some_steps_stand_for_all_and_the_page_says_so(tmp_path: Path) -> None:
    page = page_of(tmp_path, timed([*(step(i, 9.0) for i in range(1, 4502)), Note(text="all equal")]))
    assert "Every step (1\u202f501 of 4\u202f501)" in page.text
    assert "Every event as written (1\u202f502 of 4\u202f502)" in page.text
    assert "4.50 k" not in page.text
    assert page.text.count('"kind":"step"') == 1501
    for shown in ('"step":1,', '"step":4501,', "all equal"):
        assert shown in page.text


def test_every_plot_is_there_with_a_title_and_a_description(tmp_path: Path) -> None:
    page = page_of(tmp_path, whole_run())
    assert page.plots() == TRAIN_PLOTS | SERVE_PLOTS
    for name in page.plots():
        assert {f"{name}-title", f"{name}-desc"} <= set(page.ids())
    assert "Loss over 8 steps: first 8.88, last 8.00, lowest 8.00, highest 8.88." in page.text


def test_tiers_and_exposed_communication_are_shown_where_a_step_tells_of_them(tmp_path: Path) -> None:
    page = page_of(tmp_path, timed([full(step(i, 9.0)) for i in range(1, 4)]))
    assert page.plots() == TRAIN_PLOTS | TIER_PLOTS
    for tile in (
        ("Exposed communication", "12.5%", "of the steps' time, mean over ranks; 25.0% by each step's worst"),
        ("Held in dram", "4.00 GiB", "by the fullest rank"),
        ("Held in cxl", "3.00 GiB", "by the fullest rank"),
        ("Held in cxl (emulated)", "2.00 GiB", "by the fullest rank"),
        ("Held in nvme", "1.00 GiB", "by the fullest rank"),
    ):
        assert tile in page.tiles
    (row,) = [row for row in page.rows if row[:1] == ["3"]]
    tiers = "dram 4.00 GiB, cxl 3.00 GiB, cxl (emulated) 2.00 GiB, nvme 1.00 GiB"
    assert row[9:] == ["5.00 GiB", tiers, "48.0 MiB", "341 ms", "682 ms"]


def test_a_step_of_one_process_without_tiers_says_nothing_of_them(tmp_path: Path) -> None:
    page = page_of(tmp_path, plain_run())
    assert page.plots() == TRAIN_PLOTS | SERVE_PLOTS
    assert not [label for label, _, _ in page.tiles if label.startswith(("Exposed", "Held"))]


def test_no_id_stands_twice_so_that_no_plot_clips_another(tmp_path: Path) -> None:
    ids = page_of(tmp_path, whole_run()).ids()
    assert len(ids) == len(set(ids))


def test_each_plot_is_well_formed_and_takes_its_colours_from_the_page(tmp_path: Path) -> None:
    out = write_report(whole_run(), tmp_path / "report.html", "a run")
    plots = re.findall(r"<svg.*?</svg>", out.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(plots) == 6
    for plot in plots:
        ElementTree.fromstring(plot.replace("xlink:href", "href"))
        assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", plot)) <= {
            "none", "var(--plot-ink)", "var(--plot-faint)", "var(--plot-line)", "var(--plot-warn)",
        }  # fmt: skip


def test_the_report_asks_the_network_for_nothing(tmp_path: Path) -> None:
    page = page_of(tmp_path, whole_run())
    assert {"script", "link", "img", "iframe", "object", "embed", "video"}.isdisjoint(tag for tag, _ in page.tags)
    for _, attrs in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert (attrs.get(name) or "#").startswith("#")
    policies = [attrs["content"] for tag, attrs in page.tags if tag == "meta" and "http-equiv" in attrs]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert "url(http" not in (tmp_path / "deep" / "report.html").read_text(encoding="utf-8")


def _texts(body: EventBody) -> list[str]:
    return [f.name for f in dataclasses.fields(body) if isinstance(getattr(body, f.name), str)]


def _hostile(body: EventBody) -> EventBody:
    """The same event, every text of it hostile."""
    changed: dict[str, object] = dict.fromkeys(_texts(body), HOSTILE)
    if isinstance(body, LayoutProbed):
        changed |= {"failed": (HOSTILE,), "passed": (HOSTILE,)}
    return dataclasses.replace(body, **changed)  # type: ignore[arg-type]


def test_a_hostile_string_stays_text_wherever_it_comes_from(tmp_path: Path) -> None:
    hostile = [_hostile(body) for body in {type(e.body): e.body for e in whole_run()}.values()]
    config = f"name: {json.dumps(HOSTILE)}\nmodel: {{source: {json.dumps(HOSTILE)}}}\n"
    bodies = [*hostile, RunStarted(config=config, plan=HOSTILE), RunFailed(reason=HOSTILE)]
    plain = page_of(tmp_path, whole_run(), facts={"Model": "llama"})
    page = page_of(tmp_path, timed(bodies), title=HOSTILE, facts={HOSTILE: HOSTILE})
    source = (tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "<script" not in source
    # Each of their texts at least once: in the timeline or a table, and their config and plan.
    assert page.text.count(HOSTILE) >= sum(len(_texts(body)) for body in hostile)


@pytest.mark.parametrize(
    ("events", "plots", "said"),
    [
        ([], set(), ["No training in this record", "holds no training step", "holds no served request"]),
        (plain_run()[:9], TRAIN_PLOTS, ["Not finished: the record ends after 8 steps"]),
        (plain_run()[:2], TRAIN_PLOTS, ["ends after 1 step"]),
        (plain_run()[11:13], SERVE_PLOTS, ["holds no training step"]),
        (plain_run()[12:13], SERVE_PLOTS, ["no finite value"]),
        (plain_run()[:1], set(), ["ends after 0 steps", "holds no training step"]),
    ],
    ids=["nothing", "only-training", "one-step", "only-serving", "one-token", "died-at-once"],
)
def test_a_report_of_a_part_says_what_is_missing(
    tmp_path: Path, events: list[Event], plots: set[str], said: list[str]
) -> None:
    page = page_of(tmp_path, events)
    assert page.plots() == plots
    for sentence in said:
        assert sentence in page.text


@pytest.mark.parametrize(
    ("events", "sections"),
    [(plain_run(), 1), (plain_run()[:9], 0), (plain_run()[:1], 0), (plain_run()[11:13], 1), ([], 1)],
    ids=["both", "only-training", "died-at-once", "only-serving", "nothing"],
)
def test_a_record_of_training_alone_has_no_section_about_serving(
    tmp_path: Path, events: list[Event], sections: int
) -> None:
    page = page_of(tmp_path, events)
    assert page.ids().count("serving") == sections
    assert ("Serving" in page.text) == ("served request" in page.text or bool(page.plots() & SERVE_PLOTS))


def test_one_step_is_drawn_as_a_point(tmp_path: Path) -> None:
    out = write_report(plain_run()[:2], tmp_path / "report.html", "a run")
    loss = re.search(r'<svg[^>]*"plot-loss-title.*?</svg>', out.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert loss is not None
    assert re.search(r"<use [^>]*var\(--plot-line\)", loss[0])


@pytest.mark.parametrize(("value", "mark"), [(math.nan, "NaN"), (math.inf, "+inf"), (-math.inf, "-inf")])
def test_a_loss_that_is_not_finite_is_marked_in_the_plot_and_in_the_status(
    tmp_path: Path, value: float, mark: str
) -> None:
    events = [Event(float(i), step(i, value if i == 3 else 8.0 - i)) for i in range(1, 6)]
    out = write_report(events, tmp_path / "report.html", "a run")
    source = out.read_text(encoding="utf-8")
    loss = re.search(r'<svg[^>]*"plot-loss-title.*?</svg>', source, flags=re.DOTALL)
    assert loss is not None
    assert f">{mark}</text>" in loss[0]
    assert "var(--plot-warn)" in loss[0]
    assert "not finite at step 3" in Page(source).text
    assert "1 values are not finite" in Page(source).text


def test_a_run_whose_every_loss_is_nan_still_has_its_report(tmp_path: Path) -> None:
    page = page_of(tmp_path, [Event(float(i), step(i, math.nan)) for i in range(1, 8)])
    assert page.plots() == TRAIN_PLOTS
    assert "not finite at step 1, 2, 3, 4, 5, …" in page.text


def test_the_same_events_make_the_same_bytes(tmp_path: Path) -> None:
    one = write_report(whole_run(), tmp_path / "one.html", "a run").read_bytes()
    two = write_report(whole_run(), tmp_path / "two.html", "a run").read_bytes()
    assert one == two


def test_writing_a_report_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    write_report(whole_run(), tmp_path / "report.html", "a run")
    assert dict(matplotlib.rcParams) == before


def test_a_report_that_cannot_be_written_leaves_the_older_one_and_nothing_half_written(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.mkdir()
    with pytest.raises(UnreachableError, match="cannot be written"):
        write_report(whole_run(), target, "a run")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_percentile_is_a_value_that_was_measured() -> None:
    values = [0.4, 0.1, 0.3, 0.2]
    assert [percentile(values, p) for p in (0, 25, 50, 75, 99, 100)] == [0.1, 0.1, 0.2, 0.3, 0.4, 0.4]
    assert math.isnan(percentile([], 50))


def test_throughput_of_a_run_weighs_steps_by_their_length() -> None:
    slow = dataclasses.replace(step(1, 1.0), tokens=100, step_s=9.0, tokens_per_s=100 / 9)
    fast = dataclasses.replace(step(2, 1.0), tokens=100, step_s=1.0, tokens_per_s=100.0)
    assert summarize([Event(0.0, slow), Event(1.0, fast)]).tokens_per_s == 20.0


def test_a_resumed_run_counts_the_newest_report_of_each_step_and_the_newest_end() -> None:
    bodies = [
        RunStarted(config="first", plan=""),
        *(step(i, 9.0) for i in (1, 2, 3)),
        RunFinished(steps=3, tokens=3, seconds=1.0),
        RunStarted(config="second", plan=""),
        *(step(i, 5.0) for i in (3, 4)),
    ]
    died = summarize([Event(float(i), body) for i, body in enumerate(bodies)])
    assert [(s.step, s.loss) for s in died.steps] == [(1, 9.0), (2, 9.0), (3, 5.0), (4, 5.0)]
    assert died.started == RunStarted(config="second", plan="")
    assert died.ended is None
    end = RunFinished(steps=2, tokens=2, seconds=2.0)
    assert summarize([Event(float(i), body) for i, body in enumerate([*bodies, end])]).ended == end


def test_steps_whose_weights_are_gone_do_not_count() -> None:
    def counted(*bodies: EventBody) -> list[tuple[int, float]]:
        return [(s.step, s.loss) for s in summarize(timed(list(bodies))).steps]

    first = [RunStarted(config="", plan=""), *(step(i, 9.0) for i in (1, 2, 3))]
    lost = RunRestarted(step=2, redone=1, reason="lost")
    assert counted(*first, lost) == [(1, 9.0), (2, 9.0)]
    assert counted(*first, RunStarted(config="", plan=""), step(1, 5.0)) == [(1, 5.0)]
    assert counted(*first, RunStarted(config="train: {resume: false}", plan="")) == []
    assert counted(*first, RunStarted(config="train: {resume: true}", plan="")) == counted(*first)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(8192), "8\u202f192"),
        (number(4.40412, 4), "4.404"),
        (number(0.5), "0.500"),
        (number(3.0625e-4), "3.06e-04"),
        (number(math.nan), "NaN"),
        (number(-math.inf), "-inf"),
        (number(0.0), "0"),
        (byte_size(1023), "1\u202f023 B"),
        (byte_size(1 << 20), "1.00 MiB"),
        (byte_size(3 << 41), "6.00 TiB"),
        (duration(0.0), "0 s"),
        (duration(42e-6), "42.0 µs"),
        (duration(0.0215), "21.5 ms"),
        (duration(1.5), "1.50 s"),
        (duration(171.3), "2 min 51 s"),
        (duration(7260), "2 h 1 min"),
        (count(8192), "8.19 k"),
        (count(12_400_000), "12.4 M"),
    ],
)
def test_numbers_read_well(shown: str, expected: str) -> None:
    assert shown == expected


def test_a_hostile_title_or_description_of_a_plot_stays_text() -> None:
    plot = Plot(
        id="plot-x", title=HOSTILE, description=HOSTILE, x_label="</text><b>", x=[1.0, 2.0], y=[1.0, 2.0], num_x=2
    )  # fmt: skip
    page = Page(draw(plot))
    assert {"script", "img", "b"}.isdisjoint(tag for tag, _ in page.tags)
    assert page.text.count(HOSTILE) == 2
