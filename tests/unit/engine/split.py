"""Two engines of one model, joined by a transport: one computes prompts, the other goes on."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.support.zoo import zoo_model
from tests.unit.engine.tiny import ARCHITECTURES, engine_config, tiny_model
from transformers import PreTrainedModel

from farspan.engine.engine import Engine
from farspan.engine.request import SamplingParams
from farspan.kv.puller import Arrival, Puller
from farspan.kv.ticket import KvTicket, LeaseTable
from farspan.kv.transports.memory import MemoryNetwork, MemoryTransport
from farspan.kv.transports.nixl import NixlTransport

NUM_TOKENS = 20


def model_of(architecture: str) -> PreTrainedModel:
    return tiny_model(architecture) if architecture in ARCHITECTURES else zoo_model(architecture)


class Split:
    """Two engines of the same model, joined by a transport."""

    def __init__(self, architecture: str, transport: str, make: Callable[[str], PreTrainedModel] = model_of) -> None:
        self.prefill = Engine(make(architecture), engine_config(max_batch_tokens=16))
        self.decode = Engine(make(architecture), engine_config())
        network = MemoryNetwork()
        pools = self.prefill.pool, self.decode.pool
        ends = [MemoryTransport(p, network) if transport == "memory" else NixlTransport(p) for p in pools]
        self.source, self.receiver = ends
        self.leases = LeaseTable(self.prefill.pool, lease_s=60.0)
        self.puller = Puller(self.decode.pool, self.receiver, deadline_s=30.0)

    def offer(self, prompt: list[int], params: SamplingParams) -> tuple[int, KvTicket]:
        self.prefill.add("r", prompt, params, prefill_only=True)
        events = []
        while not events:
            events = self.prefill.step()
        pages, num_tokens = self.prefill.take("r")
        ticket = self.leases.offer("r", pages, num_tokens, self.source.address(), time.time())
        return events[0].token, ticket

    def pull(self, ticket: KvTicket) -> Arrival:
        pages = self.decode.pool.alloc(len(ticket.pages))
        self.puller.start(ticket, pages, time.monotonic(), time.time())
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if arrivals := self.puller.poll(time.monotonic()):
                return arrivals[0]
        raise AssertionError("the transfer did not end")

    def finish(self, prompt: list[int], params: SamplingParams, first: int, pages: list[int]) -> list[int]:
        self.decode.adopt("r", prompt, params, [first], pages)
        return [first] + [event.token for _ in range(NUM_TOKENS - 1) for event in self.decode.step()]

    def close(self) -> None:
        self.receiver.close()
        self.source.close()
