"""Measured speeds are kept and used; what is written wrong is answered in one sentence."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.plan.test_search import random_task

from farspan.errors import ConfigError, NotFoundError
from farspan.plan.calibrate import cpu_machine
from farspan.plan.cost import plan_of_choice
from farspan.plan.machine import GIB, calibrated, parse_machine, save_calibration, sheet_of, size_text
from farspan.plan.search import search


def test_this_machine_is_measured_and_its_processes_share_it() -> None:
    one, two = cpu_machine(1), cpu_machine(2)
    assert one.efficiency.measured
    assert one.device.flops > 1e9
    assert one.device.memory_bandwidth > 1e8
    assert two.num_devices == 2
    assert two.device.bytes == one.device.bytes / 2
    assert list(one.tier_bytes()) == ["device"]


@pytest.mark.parametrize(
    ("name", "gib", "sheet"),
    [
        ("NVIDIA H100 80GB HBM3", 79.6, "h100"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "a100-80"),
        ("NVIDIA A100-SXM4-40GB", 39.5, "a100-40"),
        # As Ray calls them, without their memory.
        ("A100", None, "a100-40"),
        ("AMD_Instinct_MI300X", None, "mi300x"),
        ("L4", None, "l4"),
        ("NVIDIA L40S", 44.7, "l40s"),
        ("Strange 9000", 80.0, None),
    ],
)
def test_a_data_sheet_is_found_by_the_name_a_driver_gives(name: str, gib: float | None, sheet: str | None) -> None:
    found = sheet_of(name, None if gib is None else gib * GIB)
    assert (None if found is None else found.name) == sheet


def test_a_calibration_changes_the_time_and_not_the_bytes(tmp_path: Path) -> None:
    machine = parse_machine("h100:8")
    slower = replace(machine, efficiency=replace(machine.efficiency, attention=0.05, gemm=0.06, measured=True))
    save_calibration(tmp_path / "h100.json", slower)
    found = calibrated(machine, tmp_path / "h100.json")
    assert found.efficiency == slower.efficiency
    task, _ = random_task(random.Random(7))
    choice = search(replace(task, machine=machine)).plans[0].choice
    fast = plan_of_choice(replace(task, machine=machine), choice)
    slow = plan_of_choice(replace(task, machine=found), choice)
    assert slow.step_s > 2 * fast.step_s
    assert slow.footprint == fast.footprint


def test_a_calibration_of_another_device_or_a_torn_one_is_refused(tmp_path: Path) -> None:
    machine = parse_machine("h100:8")
    save_calibration(tmp_path / "h100.json", machine)
    with pytest.raises(ConfigError, match="must be measured on h200, got 'h100'; use --gpu h100"):
        calibrated(parse_machine("h200"), tmp_path / "h100.json")
    with pytest.raises(NotFoundError, match="no such calibration"):
        calibrated(machine, tmp_path / "none.json")
    content = json.loads((tmp_path / "h100.json").read_text())
    del content["efficiency"]["gemm"]
    (tmp_path / "torn.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="must be a file of `farspan plan --calibrate`"):
        calibrated(machine, tmp_path / "torn.json")


def test_slower_tiers_are_filled_in_order_and_the_optimizer_stays_in_local_memory() -> None:
    machine = parse_machine("h100:8", host_gib=800, cxl_gib=400, nvme_gib=8000)
    assert list(machine.tier_bytes()) == ["device", "host", "cxl", "nvme"]
    assert machine.tier_bytes()["host"] == 100 * GIB
    task, _ = random_task(random.Random(7))
    plan = search(replace(task, machine=machine)).plans[0]
    footprint = replace(plan.footprint, optimizer_host=90.0 * GIB, activations_host=70.0 * GIB)
    tiers = footprint.tiers(machine.tier_bytes())
    assert (tiers["host"], tiers["cxl"], tiers["nvme"]) == (100 * GIB, 50 * GIB, 10 * GIB)


def test_bytes_are_written_for_readers() -> None:
    assert [size_text(x) for x in (0, 50 * 2**20, 1.5 * GIB, 2048 * GIB)] == ["0 MiB", "50 MiB", "1.5 GiB", "2,048 GiB"]
