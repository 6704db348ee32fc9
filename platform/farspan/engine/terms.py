"""On whose behalf and how urgently a request is answered."""

from __future__ import annotations

from dataclasses import dataclass

from farspan.kv.prefix import OPEN_SCOPE, PrefixScope


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What the scheduler knows of a request besides its tokens."""

    tenant: str = ""
    """Tenants that wait share the engine evenly."""
    priority: int = 0
    """Higher goes first, and takes pages from lower ones where there are not enough."""
    deadline_s: float | None = None
    """On the engine's clock: a request without its last token by then fails; near ones of a tenant go first."""
    adapter: str = ""
    """Which of the engine's adapters the answer comes from; empty: the model alone."""
    scope: PrefixScope = OPEN_SCOPE
    """Which earlier requests it may share pages with."""
    finds: bool = True
    """Whether it takes what earlier requests computed; not where the logits of its whole prompt are wanted."""


PLAIN_TERMS = Terms()
