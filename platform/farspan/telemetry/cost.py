"""What a run costs, from the price of a device's hour."""

from __future__ import annotations


def cost(per_worker_hour: float, worker_s: float) -> float:
    """What `worker_s` seconds of one worker cost, or as many workers as many times less."""
    return per_worker_hour * worker_s / 3600


def price_per_million(per_worker_hour: float, workers: int, tokens_per_s: float) -> float:
    """What a million tokens cost at this speed of all workers together."""
    return cost(per_worker_hour, workers * 1e6 / tokens_per_s)
