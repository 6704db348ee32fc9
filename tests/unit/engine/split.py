"""Two engines of one model, joined by a transport: one computes prompts, the other goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tests.support.zoo import zoo_model
from tests.unit.engine.tiny import ARCHITECTURES, engine_config, tiny_model
from tests.unit.kv.store import Store
from transformers import PreTrainedModel

from farspan.engine.engine import Engine
from farspan.engine.request import Event, SamplingParams, TokenEvent
from farspan.kv.pages import PagePool
from farspan.kv.puller import Arrival, Puller
from farspan.kv.ticket import KvTicket, LeaseTable
from farspan.kv.transports.base import Transport
from farspan.kv.transports.memory import MemoryNetwork, MemoryTransport
from farspan.kv.transports.nixl import NixlTransport
from farspan.kv.transports.object_store import ObjectTransport

NUM_TOKENS = 20


def model_of(architecture: str) -> PreTrainedModel:
    return tiny_model(architecture) if architecture in ARCHITECTURES else zoo_model(architecture)


class Split:
    """Two engines of the same model, joined by a transport."""

    def __init__(
        self,
        architecture: str,
        transport: str,
        make: Callable[[str], PreTrainedModel] = model_of,
        *,
        tokenizer: Any = None,
        **decode: object,
    ) -> None:
        """`decode`: what the engine that goes on is told, and the other is not."""
        self.prefill = Engine(make(architecture), engine_config(max_batch_tokens=16), tokenizer=tokenizer)
        self.decode = Engine(make(architecture), engine_config(**decode), tokenizer=tokenizer)
        network, store = MemoryNetwork(), Store()
        pools = self.prefill.pool, self.decode.pool
        makers: dict[str, Callable[[PagePool], Transport]] = {
            "memory": lambda pool: MemoryTransport(pool, network),
            "object_store": lambda pool: ObjectTransport(pool, store.open, deadline_s=30.0),
            "nixl": NixlTransport,
        }
        self.source, self.receiver = (makers[transport](pool) for pool in pools)
        self.leases = LeaseTable(self.prefill.pool, lease_s=60.0)
        self.puller = Puller(self.decode.pool, self.receiver, deadline_s=30.0)

    def offer(self, prompt: list[int], params: SamplingParams) -> tuple[int, KvTicket]:
        """The first token, and the right to the pages."""
        event, ticket = self.offer_as("r", prompt, params)
        return event.token, ticket

    def offer_as(self, name: str, prompt: list[int], params: SamplingParams) -> tuple[TokenEvent, KvTicket]:
        self.prefill.add(name, prompt, params, prefill_only=True)
        events: list[Event] = []
        while not events:
            events = self.prefill.step()
        (event,) = events
        assert isinstance(event, TokenEvent), event
        pages, num_tokens = self.prefill.take(name)
        return event, self.leases.offer(name, pages, num_tokens, self.source.address(), time.time())

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
