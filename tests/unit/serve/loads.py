"""Workers as tests make them up."""

from __future__ import annotations

from typing import Any

from farspan.serve.load import WorkerLoad


def worker(name: str, deployment: str = "decode", **more: Any) -> WorkerLoad:
    given: dict[str, Any] = {
        "incarnation": "1",
        "weights": "w",
        "layout": "l",
        "kind": "k",
        "page_tokens": 16,
        "token_bytes": 1000.0,
        "max_batch_tokens": 512,
        "max_sequences": 16,
        "free_tokens": 100_000,
        "pool_tokens": 100_000,
    }
    return WorkerLoad(worker=name, deployment=deployment, **{**given, **more})


class Plain:
    """Times that anybody can compute in their head."""

    def __init__(self, num_seen: int = 1000) -> None:
        self.num_seen = num_seen

    def prefill_s(self, kind: str, new_tokens: float, context_tokens: float) -> float:
        return 0.001 * new_tokens

    def decode_s(self, kind: str, running: float, kv_tokens: float) -> float:
        return 0.01 + 0.001 * running

    def transfer_s(self, num_bytes: float) -> float:
        return 0.01 + num_bytes * 1e-8

    def num_prefills(self, kind: str) -> int:
        return self.num_seen
