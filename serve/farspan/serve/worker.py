"""The two Serve deployments. They share everything but the verb: each is an engine host in a replica."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import aclosing

import torch
from ray import serve

from farspan.config.schema import ServeConfig
from farspan.engine.engine import Engine
from farspan.errors import ModelError
from farspan.kv.ticket import KvOffer, KvTicket
from farspan.kv.transports.choose import choose_transport
from farspan.models.checkpoint import load_causal_lm, load_tokenizer
from farspan.serve.folder import open_model_folder
from farspan.serve.host import EngineHost
from farspan.serve.messages import Failed, GenerationRequest, Prefilled, PrefillItem, StreamItem, WorkerInfo


class Worker:
    """A replica with a model, pages and a transport."""

    role = "worker"

    def __init__(self, config: ServeConfig) -> None:
        torch.set_num_threads(worker_threads(config, os.cpu_count() or 1))
        folder = open_model_folder(config.model)
        model = load_causal_lm(folder, getattr(torch, config.engine.dtype))
        if torch.cuda.is_available():
            model = model.to("cuda")
        engine = Engine(model, config.engine, tokenizer=load_tokenizer(folder))
        refuse_split(engine, config)
        self._host = EngineHost(
            self.role, engine, choose_transport(config.transfer.transport, engine.pool), config.transfer
        )
        self._host.start()

    async def info(self) -> WorkerInfo:
        return await self._host.info()

    async def cancel(self, request_id: str) -> None:
        """Forget a request whose client went away; harmless when it is not here."""
        await self._host.cancel(request_id)

    async def check_integrity(self) -> None:
        await self._host.check_integrity()

    def check_health(self) -> None:
        """Serve replaces a replica whose engine thread has ended."""
        self._host.check()

    def __del__(self) -> None:
        # Absent when the model could not be loaded.
        host = getattr(self, "_host", None)
        if host is not None:
            host.stop()


class PrefillWorker(Worker):
    """Computes prompts and hands out tickets for their pages."""

    role = "prefill"

    async def prefill(self, request: GenerationRequest) -> Prefilled | Failed:
        return await self._host.prefill(request)

    async def prefill_in_parts(self, request: GenerationRequest) -> AsyncIterator[PrefillItem]:
        """`prefill`, with offers of pages while it computes."""
        async with aclosing(self._host.prefill_in_parts(request)) as items:
            async for item in items:
                yield item

    async def release(self, ticket_id: str) -> bool:
        """The pages arrived elsewhere, or nobody wants them; true when this worker had handed them out."""
        return await self._host.release(ticket_id)


class DecodeWorker(Worker):
    """Fetches a prompt's pages (or computes them, where there is no ticket) and goes on with the answer."""

    role = "decode"

    async def resume(
        self, request: GenerationRequest, answered: tuple[int, ...], ticket: KvTicket | None
    ) -> AsyncIterator[StreamItem]:
        async for item in self._host.stream(request, answered, ticket):
            yield item

    async def follow(self, replica_id: str, offer: KvOffer) -> bool:
        """Fetch pages of a prompt that is still computed, on the replica of this id only; whether it does."""
        return serve.get_replica_context().replica_id.unique_id == replica_id and await self._host.follow(offer)


def worker_threads(config: ServeConfig, num_cpus: int) -> int:
    """CPU threads of one worker: its share of the machine, so that workers do not fight over cores."""
    num_workers = config.prefill.replicas + config.decode.replicas
    return config.engine.threads or max(1, num_cpus // num_workers)


def refuse_split(engine: Engine, config: ServeConfig) -> None:
    """Raises ModelError when prompts would be computed in one worker and answered in another, and the model cannot."""
    if not engine.pages_are_all and config.transfer.colocate_below_tokens < engine.max_context_tokens:
        raise ModelError(
            f"{config.model} keeps a state beside its pages (path: {engine.path}), which does not travel between "
            f"workers yet; set transfer.colocate_below_tokens={engine.max_context_tokens}, so that one worker computes "
            "prompt and answer"
        )
