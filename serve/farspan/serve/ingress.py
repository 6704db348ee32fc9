"""The replica of Serve's that answers clients: the `Api` of a model, or of several, over handles of their workers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from farspan.serve.api import Api
from farspan.serve.keys import ApiKey
from farspan.serve.limits import Limits
from farspan.serve.lineup import Place
from farspan.serve.listener import Listener
from farspan.serve.router import Router
from farspan.serve.routes import route
from farspan.serve.several import Several
from farspan.serve.sizing import as_metrics
from farspan.serve.ways import GuidedWays

MOST_OPEN = 1000
"""Requests at a time, of each model."""


class Ingress(Api):
    """The `Api` over the handles of the deployments."""

    def __init__(
        self, place: Place, keys: tuple[ApiKey, ...], prefill: Any, decode: Any, limits: Limits | None = None
    ) -> None:
        router = Router(prefill, decode)
        self._label, self._guided = place.label, GuidedWays(router, place.config)
        super().__init__(place.config, place.name, keys, router, self._guided, limits)

    def follow(self) -> None:
        """Keep asking the workers how they stand."""
        self._guided.listen()

    def signals(self) -> dict[str, float]:
        """What the sizes of its deployments go by."""
        self.follow()
        return as_metrics(self._guided.guide.signals(self._metrics.num_open), self._label)


class _Replica(ABC):
    """What Serve asks of whatever answers clients, from its beginning to its end."""

    _listener: Listener | None = None
    _is_open = False

    def _open(self, listener: Listener | None) -> None:
        """Everything else is there."""
        self._listener, self._is_open = listener, True

    @abstractmethod
    def follow(self) -> None: ...

    @abstractmethod
    def signals(self) -> dict[str, float]: ...

    @abstractmethod
    def close(self) -> None: ...

    async def check_health(self) -> None:
        """Asked by Serve before the first request, and again and again."""
        self.follow()
        if self._listener is not None:
            self._listener.start()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve's autoscaler is told."""
        return self.signals()

    async def __del__(self) -> None:
        if self._listener is not None:
            await self._listener.close()
        # Not where a model could not be opened.
        if self._is_open:
            self.close()


class Alone(Ingress, _Replica):
    """The ingress of one model, as Serve makes and ends it."""

    def __init__(self, place: Place, keys: tuple[ApiKey, ...], prefill: Any, decode: Any) -> None:
        super().__init__(place, keys, prefill, decode)
        self._open(_listener(self, (place,)))


class Together(Several, _Replica):
    """One `Ingress` for each model, in one process. What a key may use holds for all of them together."""

    def __init__(self, places: tuple[Place, ...], keys: tuple[ApiKey, ...], *workers: Any) -> None:
        """`workers`: the handles of prefill and decode, for one model after another."""
        limits = Limits(keys)
        roles = zip(workers[::2], workers[1::2], strict=True)
        self._ingresses = [Ingress(p, keys, *pair, limits) for p, pair in zip(places, roles, strict=True)]
        super().__init__(self._ingresses)
        self._open(_listener(self, places))

    def follow(self) -> None:
        for ingress in self._ingresses:
            ingress.follow()

    def signals(self) -> dict[str, float]:
        return {name: value for ingress in self._ingresses for name, value in ingress.signals().items()}


def _listener(api: Api | Several, places: Sequence[Place]) -> Listener | None:
    """None where Serve's proxies listen."""
    config = places[0].config
    if config.listener == "proxy":
        return None
    return Listener(
        route(lambda: api),
        config.host,
        config.port,
        most_open=MOST_OPEN * len(places),
        head_timeout_s=config.body_timeout_s,
        drain_s=max(place.config.drain_s for place in places),
    )
