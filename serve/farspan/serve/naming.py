"""What clients call the model and its adapters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from farspan.errors import ConfigError
from farspan.serve.shape import ApiError

BASE = ""
"""The adapter of whoever asks for the model alone."""
_MOST_TOLD = 10


class ModelNames:
    """Each adapter answers to its own name, and to MODEL:NAME."""

    def __init__(self, model: str, adapters: Iterable[str]) -> None:
        """Raises ConfigError when a name would mean two things."""
        self.model, self._adapters = model, {model: BASE}
        for adapter in sorted(adapters):
            for name in (adapter, f"{model}:{adapter}"):
                if name in self._adapters:
                    rule = f"must not hold a name that clients also use for {self._adapters[name] or 'the model'!r}"
                    raise ConfigError("engine.adapters", rule, name, "choose another name for the adapter")
                self._adapters[name] = adapter
        self.listed = (model, *sorted(adapters))
        """One name for each."""

    def adapter(self, asked: str) -> str:
        """The adapter a client means. Raises ApiError 404."""
        if asked in self._adapters:
            return self._adapters[asked]
        raise unknown_model(asked, self.listed)

    @property
    def all(self) -> Collection[str]:
        """Every name there is, also those that are not listed."""
        return self._adapters.keys()


def unknown_model(asked: str, listed: Sequence[str]) -> ApiError:
    """What a client hears that asks for none of the models `listed`."""
    told = ", ".join(map(repr, listed[:_MOST_TOLD])) + (", ..." if len(listed) > _MOST_TOLD else "")
    verb = "is" if len(listed) == 1 else "are"
    message = f"model {asked[:80]!r} is not served here, {told} {verb}"
    return ApiError(404, message, code="model_not_found", param="model")
