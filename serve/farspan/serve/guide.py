"""What the ingress knows and decides: it hears from the workers, learns from answers, chooses ways, gives roles.

No Ray: `router.py` asks the workers and carries out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator

from farspan.kv.prefix import PrefixScope, chain_of
from farspan.serve.autoscale import Objectives, Signals
from farspan.serve.load import LoadTable, WorkerLoad
from farspan.serve.messages import GenerationRequest
from farspan.serve.policy import Asked, Place, Route, Rules, choose_route
from farspan.serve.predict import Predictor
from farspan.serve.quotas import Demand, Orders, Quota, Roles
from farspan.serve.rates import Mean, Percentile, Rate

# Snapshots come twice a second; one that is older than this says nothing about now.
_STALE_S = 5.0
_OVER_S = 20.0
# Until answers have been seen.
_ANSWER_TOKENS = 128


class Guide:
    """Of one ingress. `clock`: monotonic seconds."""

    def __init__(self, rules: Rules, objectives: Objectives, clock: Callable[[], float] = time.monotonic) -> None:
        self._rules, self._objectives, self._clock = rules, objectives, clock
        self.times = Predictor()
        self._table = LoadTable(_STALE_S)
        self._roles, self._quotas = Roles(), dict[str, Quota]()
        now_s = clock()
        self._prompts, self._found, self._answers = (Rate(_OVER_S, now_s) for _ in range(3))
        self._answer_tokens, self._new_tokens, self._context = Mean(_ANSWER_TOKENS), Mean(1.0), Mean(1.0)
        self._first_s, self._token_s = Percentile(95), Percentile(95)

    @property
    def workers(self) -> list[WorkerLoad]:
        """Those that were heard of lately."""
        return self._table.fresh(self._clock())

    def route(self, request: GenerationRequest, avoiding: Collection[str] = ()) -> Route:
        """The way of a request from now on, not over the workers named in `avoiding`."""
        now_s = self._clock()
        fresh = [w for w in self._table.fresh(now_s) if w.worker not in avoiding]
        # Once begun with one model, an answer goes on with no other.
        workers = [w for w in fresh if request.weights in ("", w.weights)]
        asked = Asked(
            prompt_tokens=len(request.prompt),
            answer_tokens=max(1, min(request.params.max_tokens, round(self._answer_tokens.value))),
            found=self._table.found(*self._names(request, workers)) if workers else {},
            session=request.caller.session and f"{request.caller.tenant} {request.caller.session}",
            seed=request.request_id,
        )
        return choose_route(asked, workers, self.times, self._rules)

    def arrived(self, route: Route, num_prompt: int) -> None:
        """A request that is let in, and goes its way."""
        now_s, new = self._clock(), route.new_tokens or num_prompt
        if route.prefill is not None:
            self._table.sent(route.prefill.worker, new, now_s)
        if route.decode is not None:
            self._table.sent(route.decode.worker, 0 if route.split else new, now_s)
        self._prompts.add(num_prompt, now_s)
        self._found.add(num_prompt - new, now_s)
        self._new_tokens.add(new)
        self._context.add(num_prompt - new / 2)

    def first_token(self, route: Route, num_prompt: int, num_cached: int, seconds: float) -> None:
        """The first token came `seconds` after it was asked for."""
        self._first_s.add(seconds)
        place = route.prefill or route.decode
        if place is None:
            return
        # What the others got on the way is not the price of the prompt; what is left of it is never nothing.
        spent_s = max(seconds - route.between_s, seconds / 10)
        new = max(1, num_prompt - num_cached)
        self.times.learn_prefill(place.kind, place.queue_tokens + new, num_prompt - new / 2, spent_s)

    def answered(self, route: Route, num_prompt: int, num_tokens: int, seconds: float) -> None:
        """An answer of `num_tokens` tokens is complete, whose tokens after the first took `seconds`."""
        self._answer_tokens.add(num_tokens)
        if num_tokens < 2:
            return
        token_s = seconds / (num_tokens - 1)
        self._token_s.add(token_s)
        if route.decode is not None:
            held = route.decode.kv_tokens + num_prompt + num_tokens / 2
            self.times.learn_decode(route.decode.kind, route.decode.num_running + 1, held, token_s)

    def tokens(self, count: int) -> None:
        """Tokens of answers that came."""
        self._answers.add(count, self._clock())

    def pulled(self, num_bytes: int, seconds: float) -> None:
        self.times.learn_transfer(num_bytes, seconds)

    def lost(self, place: Place | None) -> None:
        """A worker that did not answer: nobody goes there until it is heard of again."""
        if place is not None:
            self.gone(place.worker)

    def gone(self, worker: str) -> None:
        self._table.forget(worker)

    def orders(self) -> dict[str, Orders]:
        """What each worker is told when it is asked next."""
        workers = self.workers
        if not self._rules.always_split:
            # Otherwise it is settled who computes prompts.
            self._quotas = self._roles.assign(workers, self.demand())
        return {w.worker: Orders(self._table.version(w.worker), self._quotas.get(w.worker)) for w in workers}

    def heard(self, load: WorkerLoad, asked_at_s: float) -> None:
        """The answer of a worker that was asked at a time of the clock."""
        self._table.put(load, asked_at_s, self._clock())

    def demand(self) -> Demand:
        """What arrives, in workers that it keeps busy."""
        told = self.signals(0)
        prefill = told.prompt_tokens_s * (1 - told.hit_rate) / told.prefill_rate if told.prefill_rate else 0.0
        return Demand(prefill, told.answer_tokens_s / told.decode_rate if told.decode_rate else 0.0)

    def signals(self, num_open: int) -> Signals:
        """What sizes are decided by."""
        now_s, workers = self._clock(), self.workers
        prompts = self._prompts.per_s(now_s)
        held, room = self._kv(workers)
        return Signals(
            prompt_tokens_s=prompts,
            hit_rate=min(1.0, self._found.per_s(now_s) / prompts) if prompts > 0 else 0.0,
            answer_tokens_s=self._answers.per_s(now_s),
            prefill_rate=self._prefill_rate(workers),
            decode_rate=self._decode_rate(workers),
            queue_age_s=max((w.oldest_wait_s for w in workers), default=0.0),
            kv_share=held / room if room else 0.0,
            token_s=self._token_s.value,
            first_s=self._first_s.value,
            num_open=num_open,
        )

    def _names(self, request: GenerationRequest, workers: list[WorkerLoad]) -> tuple[Iterator[bytes], int]:
        """(names of the pages of a prompt, tokens of each), as the workers name them."""
        layout, size = workers[0].layout, workers[0].page_tokens
        adapter = workers[0].adapters.get(request.caller.adapter, request.caller.adapter)
        chain = chain_of(layout, size, PrefixScope(adapter=adapter, salt=request.caller.salt))
        # The last token is always computed.
        places = range((len(request.prompt) - 1) // size)
        named = (chain.name(place, request.prompt) for place in places)
        return (name for name in named if name is not None), size

    def _kv(self, workers: list[WorkerLoad]) -> tuple[float, float]:
        """(tokens held, or reserved for those that run, tokens there is room for) of workers that decode."""
        decoding = [w for w in workers if w.deployment == "decode"]
        growth = self._answer_tokens.value / 2
        held = sum(w.pool_tokens - w.free_tokens + w.num_running * growth for w in decoding)
        return held, sum(w.pool_tokens for w in decoding)

    def _prefill_rate(self, workers: list[WorkerLoad]) -> float:
        if not workers:
            return 0.0
        new, kind = self._new_tokens.value, workers[0].kind
        return new / max(1e-9, self.times.prefill_s(kind, new, self._context.value))

    def _decode_rate(self, workers: list[WorkerLoad]) -> float:
        """Tokens that a worker gives in a second with as many side by side as the objective allows."""
        if not workers:
            return 0.0
        kind, each = workers[0].kind, self._context.value + self._answer_tokens.value / 2
        low, high = 1, max(1, workers[0].max_sequences)
        while low < high:
            middle = (low + high + 1) // 2
            in_time = self.times.decode_s(kind, middle, middle * each) <= self._objectives.token_s
            low, high = (middle, high) if in_time else (low, middle - 1)
        return low / max(1e-9, self.times.decode_s(kind, low, low * each))
