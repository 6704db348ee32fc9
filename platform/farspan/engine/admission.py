"""Who may come in: a request that can never be answered here is refused before anything is held for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from farspan.engine.adapters import Adapters
from farspan.engine.check import check_prompt
from farspan.engine.history import Recall
from farspan.engine.holdings import Holdings
from farspan.engine.request import SamplingParams, SequenceState
from farspan.engine.terms import Terms
from farspan.errors import RequestError


@dataclass(frozen=True, slots=True)
class Admission:
    """What an engine's model, pages and adapters let in."""

    adapters: Adapters
    recall: Recall
    holdings: Holdings
    num_pages: int
    vocab_size: int
    max_context_tokens: int
    pages_are_all: bool

    def admit(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        answered: Sequence[int],
        prefill_only: bool,
        terms: Terms,
        *,
        arrival: int,
        step: int,
    ) -> SequenceState:
        """The sequence of a request, which holds nothing yet. Raises RequestError."""
        tokens, terms = [*prompt, *answered], self.adapters.terms(request_id, terms)
        check_prompt(request_id, tokens, len(prompt), params, self.vocab_size)
        self._check_length(request_id, len(prompt), len(tokens), params, prefill_only)
        if params.prompt_logprobs is not None and not answered:
            # Every token of the prompt is computed here: its logits are wanted.
            terms = replace(terms, finds=False)
        # Before anything is remembered of the request: it may be refused.
        history = self.recall.recall(request_id, params, prompt, answered)
        return SequenceState(
            request_id, tokens, len(prompt), params, arrival, prefill_only, terms=terms, last_step=step, history=history
        )

    def check_travel(self, request_id: str) -> None:
        """Raises RequestError where pages are not all that a sequence needs."""
        if not self.pages_are_all:
            raise RequestError(
                request_id,
                "this model keeps all or part of a sequence in a cache that is not in pages, which does not travel to "
                "another worker; compute prompt and answer in one (transfer.colocate_below_tokens)",
            )

    def most_pages(self, num_prompt: int, num_tokens: int, params: SamplingParams, leaves: bool) -> int:
        """The most pages a request of `num_tokens` tokens can hold at a time."""
        most = self.holdings.most_pages(self._longest(num_prompt, params), leaves=False)
        # A state that leaves is in pages too.
        return max(most, self.holdings.most_pages(num_tokens, leaves=True)) if leaves else most

    def _check_length(
        self, request_id: str, num_prompt: int, num_tokens: int, params: SamplingParams, leaves: bool
    ) -> None:
        if num_prompt + 1 > self.max_context_tokens:
            most = self.max_context_tokens - 1
            raise RequestError(request_id, f"the prompt has {num_prompt} tokens, the model takes at most {most}")
        needed = self.most_pages(num_prompt, num_tokens, params, leaves)
        num_pages = self.num_pages - self.holdings.num_pinned
        if needed > num_pages:
            longest = self._longest(num_prompt, params)
            raise RequestError(
                request_id,
                f"prompt and answer need {longest} tokens of KV in {needed} pages, engine.kv_bytes holds {num_pages}",
            )

    def _longest(self, num_prompt: int, params: SamplingParams) -> int:
        """The most tokens a request can hold: the last token chosen is never computed."""
        return min(num_prompt + params.max_tokens, self.max_context_tokens) - 1
