"""What travels between the ingress and the workers: plain values, torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from farspan.engine.draft import NO_GUESSES, DraftUse
from farspan.engine.request import SamplingParams, TokenLogprobs
from farspan.errors import FarspanError
from farspan.kv.host_index import HostUse
from farspan.kv.ticket import KvOffer, KvTicket


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """On whose behalf, and as which model, a request is answered; the workers learn nothing else of a key."""

    tenant: str = ""
    salt: str = ""
    """Requests of different salts share no pages. A keyed hash: nobody finds the API key from it."""
    session: str = ""
    """Requests of one session are likely to begin alike, and go to the same workers where that costs nothing."""
    priority: int = 0
    """Higher goes first."""
    deadline_at_s: float | None = None
    """Wall clock, as in tickets: workers on other machines have other monotonic clocks."""
    adapter: str = ""
    """Which of the engine's adapters; empty: the model alone."""


ANYBODY = Caller()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and how to answer it."""

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    caller: Caller = ANYBODY
    weights: str = ""
    """Fingerprint of the only model that may answer it; empty: any. A checkpoint may be replaced meanwhile."""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The prompt is computed: its first token, and the right to fetch its pages unless the answer ends here."""

    token: int
    finish: str | None
    ticket: KvTicket | None
    seconds: float
    """Since the engine took the prompt up, until its first token."""
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    num_cached: int = 0
    """Tokens of the prompt that were there already."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """The pages of the prompt arrived and are verified."""

    num_pages: int
    num_bytes: int
    seconds: float
    """How long they were waited for, once the prompt was computed."""
    transport: str
    num_early: int = 0
    """Pages that were fetched, or under way, while the prompt was still computed."""
    digest: str = ""
    """Of what they hold, as it was verified."""
    room_s: float = 0.0
    """How long free pages were waited for before the first was asked for; not part of `seconds`."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The next tokens, oldest first; `finish` belongs to the last one."""

    tokens: tuple[int, ...]
    finish: str | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each token where they were asked for."""
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    """With the first token, where they were asked for: one for each prompt token after the first."""
    num_cached: int = 0
    """With the first token: tokens of the prompt that were there already."""
    computed_s: float = 0.0
    """With the first token: since the engine took the prompt up."""

    def followed_by(self, later: Tokens) -> Tokens:
        """Both as one item."""
        return Tokens(
            self.tokens + later.tokens,
            later.finish,
            self.logprobs + later.logprobs,
            self.prompt_logprobs,
            self.num_cached,
            self.computed_s,
        )


@dataclass(frozen=True, slots=True)
class Failed:
    """The worker cannot (go on to) answer. A value, not an exception: a stream keeps what came before it."""

    error: FarspanError


@dataclass(frozen=True, slots=True)
class Alive:
    """Nothing new, but the worker is there: without it nobody could tell a long prompt from a frozen process."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """The rest of an answer comes by the stream that the ingress has for all answers of a worker."""


StreamItem = Pulled | Tokens | Failed
PrefillItem = KvOffer | Prefilled | Failed


@dataclass(frozen=True, slots=True)
class Bundle:
    """Items of several answers, each with its request; those of one answer in the order in which they came."""

    items: tuple[tuple[str, StreamItem | PrefillItem], ...]


NUM_ROLES = 2
"""Prefill and decode."""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker says about itself."""

    role: str
    pid: int
    layout: str
    """Fingerprint: workers with different ones do not exchange pages."""
    vocab_size: int
    max_context_tokens: int
    kv_tokens: int
    """The longest prompt and answer that its pages are enough for."""
    num_pages: int
    num_free: int
    num_quarantined: int
    num_requests: int
    open_leases: int
    num_forgotten: int = 0
    """Pages that were held for nobody when it had nothing to do last."""
    drafted: DraftUse = NO_GUESSES
    """What came of its guesses since it started."""
    host: HostUse | None = None
    """None: nothing is kept in host memory."""
    transport: str = ""
    """Workers with different ones do not exchange pages."""
    transport_reason: str = ""
    """Why it is this one."""
    worker: str = ""
    """Its replica."""
