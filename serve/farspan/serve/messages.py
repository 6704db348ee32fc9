"""What travels between the ingress and the workers: plain values, torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from farspan.engine.request import SamplingParams
from farspan.errors import FarspanError
from farspan.kv.ticket import KvTicket


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and how to answer it."""

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The prompt is computed: its first token, and the right to fetch its pages unless the answer ends here."""

    token: int
    finish: str | None
    ticket: KvTicket | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Pulled:
    """The pages of the prompt arrived and are verified."""

    num_pages: int
    num_bytes: int
    seconds: float
    transport: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """The next tokens, oldest first; `finish` belongs to the last one."""

    tokens: tuple[int, ...]
    finish: str | None


@dataclass(frozen=True, slots=True)
class Failed:
    """The worker cannot (go on to) answer. A value, not an exception: a stream keeps what came before it."""

    error: FarspanError


StreamItem = Pulled | Tokens | Failed


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
    """Tokens the whole page pool holds."""
    num_pages: int
    num_free: int
    num_quarantined: int
    num_requests: int
    open_leases: int
