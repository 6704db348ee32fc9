"""The whole of serving in one process: the ASGI app, a prefill worker and decode workers, the official client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import torch

from farspan.config.schema import EngineConfig, ServeConfig, TransferConfig
from farspan.engine.engine import Engine
from farspan.errors import ClusterError
from farspan.kv.ticket import KvOffer
from farspan.kv.transports.memory import MemoryNetwork, MemoryTransport
from farspan.models.checkpoint import load_causal_lm, load_tokenizer
from farspan.serve.api import Api
from farspan.serve.host import EngineHost
from farspan.serve.keys import ApiKey, parse_key
from farspan.serve.messages import Failed, Prefilled, Tokens
from farspan.serve.routes import route

ENGINE = {"dtype": "float64", "page_tokens": 4, "kv_bytes": 8 * 1024 * 1024, "max_batch_tokens": 256}


class LocalWorkers:
    """One prefill worker and two decode workers. `die_after`: the first decode worker is lost after so many tokens."""

    def __init__(self, folder: Path, **engine: Any) -> None:
        network, tokenizer = MemoryNetwork(), load_tokenizer(folder)
        self.config = EngineConfig(**{**ENGINE, **engine})
        roles = ("prefill", "decode", "decode")
        self.engines = [
            Engine(load_causal_lm(folder, torch.float64), self.config_of(role), tokenizer=tokenizer) for role in roles
        ]
        self.hosts = [
            EngineHost(role, engine, MemoryTransport(engine.pool, network), TransferConfig())
            for role, engine in zip(roles, self.engines, strict=True)
        ]
        self.die_after: int | None = None
        self.deaths = 0
        self.asked: list[Any] = []
        self.prefilled: list[Any] = []
        self.followed: list[bool] = []
        for host in self.hosts:
            host.start()

    def config_of(self, role: str) -> EngineConfig:
        """The same for all."""
        return self.config

    async def prefill(self, request):
        self.asked.append(request)
        prefilled, told = None, False
        async for item in self.hosts[0].prefill_in_parts(request):
            if isinstance(item, KvOffer):
                told = await self.hosts[1].follow(item)
                self.followed.append(told)
            else:
                prefilled = item
        self.prefilled.append(prefilled)
        if told and isinstance(prefilled, Prefilled) and prefilled.ticket is None:
            self.cancel(request.request_id)
        return prefilled

    async def resume(self, request, answered, ticket):
        self.asked.append(request)
        dying = self.die_after is not None and len(answered) < self.die_after
        left = self.die_after - len(answered) if dying else None
        stream = self.hosts[1 if dying or self.die_after is None else 2].stream(request, answered, ticket)
        try:
            async for item in stream:
                if dying and isinstance(item, Tokens):
                    # What a dead worker would have sent after its last token never arrives.
                    item = Tokens(item.tokens[:left], None, item.logprobs[:left], item.prompt_logprobs)
                    left -= len(item.tokens)
                    yield item
                    if left == 0:
                        self.deaths += 1
                        yield Failed(ClusterError("the decode worker was lost: ActorDiedError"))
                        return
                    continue
                yield item
        finally:
            await stream.aclose()

    def reroute(self, request, *, begun):
        return False

    def release(self, ticket_id):
        self._errand(self.hosts[0].release(ticket_id))

    def cancel(self, request_id):
        for host in self.hosts:
            self._errand(host.cancel(request_id))

    async def info(self):
        return [replace(await host.info(), worker=str(number)) for number, host in enumerate(self.hosts)]

    def stop(self) -> None:
        for host in self.hosts:
            host.stop()

    def _errand(self, work: Coroutine) -> None:
        self._errands = {task for task in getattr(self, "_errands", set()) if not task.done()}
        self._errands.add(asyncio.ensure_future(work))


class Served:
    """An endpoint that is asked without a network."""

    make_workers: Callable[..., Any] = LocalWorkers

    def __init__(self, folder: Path, lines: tuple[str, ...] = ("sk-one", "sk-two"), **settings: Any) -> None:
        engine = settings.pop("engine", {})
        self.folder, self.workers = folder, self.make_workers(folder, **engine)
        keys: tuple[ApiKey, ...] = tuple(parse_key(line, number) for number, line in enumerate(lines, 1))
        self.config = ServeConfig(model=str(folder), engine=self.workers.config, **settings)
        self.api = Api(self.config, "tiny", keys, self.workers)
        self.app = route(lambda: self.api)

    def http(self, key: str = "sk-one") -> httpx.AsyncClient:
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app),
            base_url="http://test",
            headers={b"authorization": f"Bearer {key}".encode("latin-1")},
            timeout=60,
        )

    def ask(self, work: Callable[[openai.AsyncOpenAI], Coroutine], key: str = "sk-one") -> Any:
        """What `work` gives, with OpenAI's own client; afterwards nothing is held."""

        async def run() -> Any:
            async with self.http(key) as http:
                client = openai.AsyncOpenAI(
                    base_url="http://test/v1", api_key=key, http_client=http, max_retries=0, timeout=60
                )
                found = await work(client)
            await self.settled()
            return found

        return asyncio.run(run())

    def post(self, path: str, body: Any, key: str = "sk-one", **more: Any) -> httpx.Response:
        content = {"content": body} if isinstance(body, bytes) else {"json": body}

        async def run() -> httpx.Response:
            async with self.http(key) as http:
                return await http.post(path, **content, **more)

        return asyncio.run(run())

    def get(self, path: str, key: str = "sk-one") -> httpx.Response:
        async def run() -> httpx.Response:
            async with self.http(key) as http:
                return await http.get(path)

        return asyncio.run(run())

    async def settled(self, within_s: float = 30.0) -> None:
        """Every page is free and nobody is waited for."""
        async with asyncio.timeout(within_s):
            while not all(idle(info) for info in await self.workers.info()):
                await asyncio.sleep(0.01)
        for host in self.workers.hosts:
            await host.check_integrity()

    def stop(self) -> None:
        self.workers.stop()


def idle(info) -> bool:
    return info.num_free == info.num_pages and not info.num_requests and not info.open_leases
