"""Guesses of tokens, with what the others leave of an iteration and of the pages."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

from farspan.config.schema import EngineConfig
from farspan.engine.draft import Ask, Drafter, DraftRoom, SuffixDrafter, allowed_draft, draft_limit, split_room
from farspan.engine.draft_folder import unfit_target
from farspan.engine.draft_model import ModelDrafter
from farspan.engine.path import Path
from farspan.engine.request import SequenceState
from farspan.kv.layout import KvLayout
from farspan.kv.ownership import Forgotten


@dataclass(frozen=True, slots=True)
class Guesses:
    """What is guessed for an engine's sequences, `most` tokens each at a time."""

    drafter: Drafter
    most: int
    vocab_size: int
    max_context_tokens: int
    layout: KvLayout

    @classmethod
    def of(
        cls, path: Path, config: EngineConfig, drafter: Drafter | None, vocab_size: int, max_context_tokens: int
    ) -> Guesses:
        """Those of `drafter`, or from the text. Raises ConfigError for a draft model that could not be of use."""
        if config.draft_model is not None and path.states is not None:
            raise unfit_target(f"it runs {path.name}", config.draft_model)
        # A state that went on with a wrong guess cannot be set back.
        most = config.draft_tokens if path.states is None else 0
        return cls(drafter or SuffixDrafter(), most, vocab_size, max_context_tokens, path.pool.layout)

    def forgotten(self, alive: Container[str]) -> list[Forgotten]:
        """Pages that a draft model holds for no request that is `alive`.

        Raises EngineError when one of its pages is lost or doubly owned.
        """
        return self.drafter.forgotten(alive) if isinstance(self.drafter, ModelDrafter) else []

    def draft(self, sequences: Sequence[SequenceState], tokens_left: int, num_free: int) -> list[SequenceState]:
        """Guess tokens of the sequences that decode; those that were asked, for which pages are to be found."""
        if not self.most:
            return []
        groups = self.layout.num_groups
        room = DraftRoom(tokens_left, num_free // groups, self.layout.page_tokens)
        wishes = [min(self.most, draft_limit(s, self.max_context_tokens)) for s in sequences]
        places = [len(s.pages) // groups for s in sequences]
        granted = split_room(room, [len(s.tokens) for s in sequences], places, wishes)
        asked = [(s, most) for s, most in zip(sequences, granted, strict=True) if most > 0]
        guesses = self.drafter.propose([Ask(s.request_id, s.tokens, most, s.params) for s, most in asked])
        for (sequence, most), guess in zip(asked, guesses, strict=True):
            sequence.draft = allowed_draft(sequence, guess[:most], self.vocab_size)
        return [sequence for sequence, _ in asked]
