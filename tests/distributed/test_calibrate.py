"""The exchange between ranks is measured as what it carries."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from tests.support.ranks import RankPool

from farspan.parallel.exchange import Exchange
from farspan.plan.calibrate import all_to_all_bandwidth, with_exchange
from farspan.plan.machine import parse_machine

_BYTES, _CALLS = 1 << 20, 6  # one call that does not count, five that do


def measured() -> Any:
    group = dist.group.WORLD
    assert group is not None
    exchange = Exchange(group)
    bandwidth = all_to_all_bandwidth(exchange, torch.device("cpu"), _BYTES)
    return bandwidth, exchange.bytes_sent


def test_an_all_to_all_is_measured_and_becomes_the_speed_between_devices(ranks: RankPool) -> None:
    for bandwidth, sent in ranks.run(measured, 2):
        assert sent == _CALLS * _BYTES // 2
        assert 1e6 < bandwidth < 1e12
        machine = with_exchange(parse_machine("h100:2"), bandwidth)
        assert machine.between(2) == machine.efficiency.node * machine.device.node_bandwidth
        assert abs(machine.between(2) / bandwidth - 1) < 1e-9
