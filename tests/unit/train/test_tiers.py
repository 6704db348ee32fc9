"""What a plan says before a run about the tiers its run will use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.corpus import small_corpus
from tests.support.runs import tiny_run

from farspan.cli.train import plan_of
from farspan.errors import CorruptDataError, NotFoundError, PlanError
from farspan.train.tiers import FILE, kept_of_run

AUTO = ["memory.offload_activations=auto", "weights.offload_optimizer=cpu"]
CXL = "memory.tiers=['cxl:emulated:64MiB','cxl:emulated:32MiB']"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_corpus(tmp_path_factory.mktemp("tiers"))


def lines(corpus: str, output: Path, *options: str) -> dict[str, str]:
    return dict(plan_of(tiny_run(corpus, str(output), *options)).lines())


def test_the_plan_says_for_each_kind_of_bytes_where_it_lies_and_why(corpus: str, tmp_path: Path) -> None:
    said = lines(corpus, tmp_path, *AUTO, CXL)
    assert "in host memory: the optimizer" in said["optimizer"]
    assert "is computed on 2 times a step: host memory has the lowest latency" in said["optimizer"]
    assert "cxl:emulated:64MiB (emulated) + " in said["activations"]
    assert "is only streamed: striped over cxl:emulated:64MiB (emulated), " in said["activations"]
    assert "is measured when the run starts" in said["tiers"]
    assert list(tmp_path.iterdir()) == [], "a plan measures nothing and keeps nothing"
    assert not {"optimizer", "activations", "tiers"} & lines(corpus, tmp_path).keys()


def test_speeds_of_a_file_and_of_an_earlier_start_decide_the_shares_a_plan_tells(corpus: str, tmp_path: Path) -> None:
    def rows(fast: float, slow: float) -> list[dict[str, object]]:
        named = (("cxl:emulated:64MiB", fast), ("cxl:emulated:32MiB", slow))
        times = {"read_latency_s": 1e-6, "write_latency_s": 1e-6}
        return [{"tier": name, "read_bytes_per_s": v, "write_bytes_per_s": v, **times} for name, v in named]

    equal = lines(corpus, tmp_path, *AUTO, CXL)["activations"]
    (tmp_path / FILE).write_text(json.dumps({"host_bytes": 1 << 30, "rows": rows(3e9, 1e9)}))
    kept = lines(corpus, tmp_path, *AUTO, CXL)
    assert "tiers" not in kept
    assert kept["activations"] != equal
    (tmp_path / "mine.json").write_text(json.dumps({"memory": rows(1e9, 1e9)}))
    told = lines(corpus, tmp_path, *AUTO, CXL, f"memory.speeds={tmp_path}/mine.json")
    assert told["activations"] == equal, "what the user gives counts more"
    with pytest.raises(NotFoundError):
        lines(corpus, tmp_path, *AUTO, CXL, f"memory.speeds={tmp_path}/other.json")


def test_what_fits_nowhere_is_refused_before_anything_starts(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"memory.tiers: the optimizer .* is computed on and needs \d+ bytes of DRAM"):
        lines(corpus, tmp_path, *AUTO, "memory.tiers=['dram:4KiB']")


@pytest.mark.parametrize("text", ["", "{}", '{"rows": []}', '{"rows": [], "host_bytes": "many"}'])
def test_a_record_of_tiers_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(CorruptDataError, match=FILE):
        kept_of_run(tiny_run("c", str(tmp_path)))
