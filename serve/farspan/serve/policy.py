"""Where a request goes: a pure choice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Route:
    """`split`: prefill on a prefill worker, then decode elsewhere; otherwise everything on the decode worker."""

    split: bool
    reason: str


def choose_route(num_prompt_tokens: int, colocate_below_tokens: int) -> Route:
    """Short prompts are computed where they are decoded: fetching their pages costs more than computing them."""
    if num_prompt_tokens < colocate_below_tokens:
        return Route(False, f"{num_prompt_tokens} prompt tokens, fewer than {colocate_below_tokens}")
    return Route(True, "prompt is worth a prefill worker")
