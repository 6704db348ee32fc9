"""What happens to a tensor that backward will need: decided by the module and the operator that made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from farspan.errors import ConfigError


class Action(StrEnum):
    """Move it to a tier, leave it where it is, or compute it again."""

    OFFLOAD = "offload"
    KEEP = "keep"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True)
class Rule:
    """`module` and `op` are patterns (`*` matches anything): `model.layers.*.mlp*`, `aten.mm.default`.

    A pattern also matches everything inside a module it names.
    """

    action: Action
    module: str = "*"
    op: str = "*"

    def matches(self, module: str, op: str) -> bool:
        inside = fnmatchcase(module, self.module) or fnmatchcase(module, f"{self.module}.*")
        return inside and fnmatchcase(op, self.op)


@dataclass(frozen=True, slots=True)
class SavePolicy:
    """The first rule that matches decides; `default` where none does."""

    rules: Sequence[Rule] = ()
    default: Action = Action.OFFLOAD

    def decide(self, module: str, op: str) -> Action:
        return next((rule.action for rule in self.rules if rule.matches(module, op)), self.default)

    @property
    def asks_for_modules(self) -> bool:
        return any(rule.module != "*" for rule in self.rules)

    def refuse_recompute(self) -> None:
        """
        Raises:
            ConfigError: it recomputes, or tells operators apart, where only a layer that is recomputed can do that.
        """
        for rule in (*self.rules, Rule(self.default)):
            if rule.action is Action.RECOMPUTE or rule.op != "*":
                raise ConfigError(
                    "memory.offload_activations",
                    "can recompute, or tell operators apart, only in layers that are recomputed",
                    f"{rule.action.value} for module {rule.module}, op {rule.op}",
                    "set train.recompute=true and give the policy to recompute_contexts",
                )
