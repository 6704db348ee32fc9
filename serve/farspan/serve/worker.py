"""The two Serve deployments: each is an engine host in a replica, and each replica can do everything.

What a deployment is for is where its workers are chosen first; what a worker does is its quota.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from functools import partial

import torch
from ray import serve

from farspan.config.schema import ServeConfig
from farspan.engine.cut import Share
from farspan.engine.engine import Engine
from farspan.engine.ranked import RankedTransport
from farspan.errors import ClusterError, ModelError
from farspan.kv.ticket import KvOffer, KvTicket
from farspan.kv.transports.choose import Chosen
from farspan.models.checkpoint import load_causal_lm, load_tokenizer
from farspan.models.folder import open_model_folder
from farspan.serve.agent import open_host_cache
from farspan.serve.host import EngineHost
from farspan.serve.life import PULSE_S
from farspan.serve.load import Identity, WorkerLoad
from farspan.serve.messages import (
    Alive,
    Bundle,
    Elsewhere,
    Failed,
    GenerationRequest,
    Prefilled,
    PrefillItem,
    StreamItem,
    WorkerInfo,
)
from farspan.serve.object_store import open_transport
from farspan.serve.quotas import Orders
from farspan.serve.ranks import Ranks, on_device
from farspan.serve.trunk import Trunks


class Worker:
    """A replica with a model, pages and a transport."""

    role = "worker"

    def __init__(self, config: ServeConfig, num_beside: int = 0) -> None:
        """`num_beside`: ranks of other models' workers on the same machines."""
        threads = worker_threads(config, os.cpu_count() or 1, num_beside)
        torch.set_num_threads(threads)
        self._ranks: Ranks | None = None
        if config.engine.tensor_parallel > 1:
            self._ranks = Ranks(config, getattr(config, self.role), threads)
        folder = open_model_folder(config.model)
        model = load_causal_lm(folder, getattr(torch, config.engine.dtype))
        # Before it moves: the device has room for its share alone.
        share = None if self._ranks is None else Share.of(model, self._ranks.meet())
        model = on_device(model)
        open_cache = partial(open_host_cache, config.engine.host_cache_bytes)
        engine = Engine(model, config.engine, tokenizer=load_tokenizer(folder), host_cache=open_cache, share=share)
        refuse_split(engine, config)
        chosen = _transport(engine, config)
        self._transport_reason = chosen.reason
        self._host = EngineHost(self.role, engine, chosen.transport, config.transfer, PULSE_S)
        self._weights = engine.pool.layout.model
        self._identity = Identity(replica_name(), self.role, uuid.uuid4().hex, machine_kind(engine))
        self._drain_s = min(config.drain_s, config.transfer.deadline_s)
        self._trunks = Trunks(PULSE_S, config.stream_interval_s)
        self._host.start()

    async def prefill(self, request: GenerationRequest) -> Prefilled | Failed:
        """Compute a prompt and its first token; a ticket for its pages."""
        return refusal(request, self._weights) or await self._host.prefill(request)

    async def prefill_in_parts(self, request: GenerationRequest) -> AsyncIterator[PrefillItem | Alive]:
        """`prefill`, with offers of pages while it computes."""
        if (refused := refusal(request, self._weights)) is not None:
            yield refused
            return
        # It was taken on, and waits in no queue but the engine's.
        yield Alive()
        async with aclosing(self._host.prefill_in_parts(request)) as items:
            async for item in items:
                yield item

    async def follow(self, replica_id: str, offer: KvOffer) -> bool | None:
        """Fetch pages of a prompt that is still computed; whether it does, none on another replica than that one."""
        return await self._host.follow(offer) if self._identity.worker == replica_id else None

    async def resume(
        self, request: GenerationRequest, answered: tuple[int, ...], ticket: KvTicket | None, trunk: str
    ) -> AsyncIterator[StreamItem | Alive | Elsewhere]:
        """Fetch a prompt's pages (or compute them, where there is no ticket) and go on with the answer.

        `trunk`: the name of one that its tokens may go by.
        """
        if (refused := refusal(request, self._weights)) is not None:
            yield refused
            return
        yield Alive()
        with self._trunks.rider(trunk) as ridden:
            async with aclosing(self._host.stream(request, answered, ticket, ridden)) as items:
                async for item in items:
                    yield item

    async def carry(self, replica_id: str, trunk: str) -> AsyncIterator[Bundle | Alive]:
        """Say what goes by a trunk, on the replica of this id only."""
        if self._identity.worker != replica_id:
            return
        async with aclosing(self._trunks.opened(trunk)) as bundles:
            async for bundle in bundles:
                yield bundle

    async def release(self, ticket_id: str) -> bool:
        """The pages arrived elsewhere, or nobody wants them; true when this worker had handed them out."""
        return await self._host.release(ticket_id)

    async def report(self, orders: Mapping[str, Orders]) -> WorkerLoad:
        """How this worker stands; what it is told holds from now on."""
        mine = orders.get(self._identity.worker, Orders())
        return await self._host.report(self._identity, mine.quota, mine.known_prefixes)

    async def info(self) -> WorkerInfo:
        info = await self._host.info()
        return replace(info, transport_reason=self._transport_reason, worker=self._identity.worker)

    async def cancel(self, request_id: str) -> None:
        """Forget a request whose client went away; harmless when it is not here."""
        await self._host.cancel(request_id)

    async def check_integrity(self) -> None:
        await self._host.check_integrity()

    def check_health(self) -> None:
        """Serve replaces a replica whose engine thread, or another rank, has ended."""
        self._host.check()
        if self._ranks is not None:
            self._ranks.check()

    async def __del__(self) -> None:
        # Absent when the model could not be loaded.
        host: EngineHost | None = getattr(self, "_host", None)
        if host is not None:
            await host.drain(self._drain_s)
            host.stop()


class PrefillWorker(Worker):
    """One that is chosen for prompts first."""

    role = "prefill"


class DecodeWorker(Worker):
    """One that is chosen for answers first."""

    role = "decode"


def refusal(request: GenerationRequest, weights: str) -> Failed | None:
    """Keys and values of one checkpoint, or the beginning of its answer, mean nothing to another."""
    if request.weights in ("", weights):
        return None
    return Failed(ClusterError("this worker has another checkpoint than the one that the answer began with"))


def replica_name() -> str:
    """What calls name this replica by."""
    return str(serve.get_replica_context().replica_id.unique_id)


def _transport(engine: Engine, config: ServeConfig) -> Chosen:
    own = open_transport(config.transfer, engine.pool)
    if engine.leader is None:
        return own
    return replace(own, transport=RankedTransport(own.transport, engine.leader, engine.pool))


def machine_kind(engine: Engine) -> str:
    """Equal for workers that take equally long."""
    device, num_ranks = engine.pool.device, engine.pool.layout.num_ranks
    one = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return one if num_ranks == 1 else f"{num_ranks} x {one}"


def worker_threads(config: ServeConfig, num_cpus: int, num_beside: int = 0) -> int:
    """CPU threads of one worker, or one rank of it: its share of the machine, so that they do not fight over cores."""
    num_workers = num_beside + sum(role.most for role in (config.prefill, config.decode))
    return config.engine.threads or max(1, num_cpus // max(1, num_workers * config.engine.tensor_parallel))


def refuse_split(engine: Engine, config: ServeConfig) -> None:
    """Raises ModelError when prompts would be computed in one worker and answered in another, and the model cannot."""
    always = config.transfer.split == "always" and config.transfer.colocate_below_tokens < engine.max_context_tokens
    if always and not engine.pages_are_all:
        raise ModelError(
            f"{config.model} keeps a state beside its pages (path: {engine.path}), which does not travel between "
            "workers yet; use transfer.split=predicted, so that one worker computes prompt and answer"
        )
