"""What EC2 says before it takes a node back, and how long that leaves."""

from datetime import UTC, datetime, timedelta

import pytest

from farspan.cluster.spot import SpotNotice, read_notice, seconds_left

NOW = datetime(2026, 9, 18, 8, 20, tzinfo=UTC)


def test_the_notice_of_the_ec2_guide_is_read() -> None:
    notice = read_notice('{"action": "terminate", "time": "2026-09-18T08:22:00Z"}', NOW)
    assert notice == SpotNotice("terminate", datetime(2026, 9, 18, 8, 22, tzinfo=UTC))
    assert seconds_left(notice, NOW) == 120


def test_hibernation_begins_at_once_and_a_time_without_a_zone_is_utc() -> None:
    assert read_notice('{"action": "hibernate"}', NOW) == SpotNotice("hibernate", NOW)
    assert seconds_left(read_notice('{"action": "stop", "time": "2026-09-18T08:21:30"}', NOW), NOW) == 90


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", '{"action": "stop", "time": "soon"}', '{"time": 7}', "<html>"]
)
def test_a_notice_that_cannot_be_read_is_one_for_now(text: str) -> None:
    assert read_notice(text, NOW) == SpotNotice("unknown", NOW)


def test_what_is_overdue_leaves_no_time() -> None:
    assert seconds_left(SpotNotice("stop", NOW - timedelta(minutes=5)), NOW) == 0
