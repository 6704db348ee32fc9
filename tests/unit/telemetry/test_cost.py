"""What a run costs."""

import pytest

from farspan.telemetry.cost import cost, price_per_million


def test_a_million_tokens_cost_the_hours_they_take_on_all_workers() -> None:
    # 1e6 tokens at 1000 a second are 1000 s on each of 2 workers at 3.6 an hour.
    assert price_per_million(3.6, 2, 1000.0) == pytest.approx(2.0)
    assert cost(3.6, 2 * 1000.0) == pytest.approx(2.0)
