"""A record says what it says, and nothing where it does not."""

import pytest

from farspan.config.load import dump_config, load_config
from farspan.config.schema import RunConfig
from farspan.telemetry.recorded import RecordedRun, recorded_run


def test_a_report_reads_the_keys_that_a_run_records() -> None:
    said = ["name=long", "model.architecture=llama", "parallel.workers=4", "train.resume=false"]
    config = load_config(RunConfig, None, ["data.corpus=x", "resources.price_per_gpu_hour=3", *said])
    assert recorded_run(dump_config(config)) == RecordedRun("long", "llama", 4, False, 3.0)


@pytest.mark.parametrize(
    "text",
    ["", "no: [yaml", "3", "- a", "parallel: 2", "parallel: {workers: many}\nresources: {price_per_gpu_hour: [3]}",
     "resources: {price_per_gpu_hour: -1}\nparallel: {workers: 0}\ntrain: {resume: 0}", "model: {source: 3}"],
)  # fmt: skip
def test_what_is_no_config_says_nothing(text: str) -> None:
    assert recorded_run(text) == RecordedRun()
