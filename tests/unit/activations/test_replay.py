"""Inside a recomputed layer: each operator's result is kept, moved or computed again, and nothing changes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tests.unit.activations.tiny import CAPACITY, CPU, equal, gradients, offloading, recompute, tiny_llama
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from farspan.activations.offload import ActivationOffload
from farspan.activations.offload_policy import Action, Rule, SavePolicy
from farspan.activations.offload_replay import recompute_contexts
from farspan.errors import TrainingError
from farspan.memory.host import DramTier

RECOMPUTE = Action.RECOMPUTE


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[str(func)] += 1
        return func(*args, **(kwargs or {}))


def products(action: Action, module: str = "*") -> SavePolicy:
    return SavePolicy([Rule(action, module=module, op="aten.mm.default")], default=RECOMPUTE)


def count(policy: SavePolicy) -> tuple[int, int]:
    """(matrix products of a step, bytes that left)."""
    model = tiny_llama(layers=2)
    want = gradients(model)
    with offloading(DramTier(CAPACITY), model, debug=True, keep_last=0) as offload:
        recompute(model, recompute_contexts(offload, policy))
        assert equal(gradients(model, 0, offload), want)
        with Counting() as counting:
            assert equal(gradients(model, 0, offload), want)
        return counting.ops["aten.mm.default"], offload.report.stored_bytes


def test_offloaded_products_are_moved_and_not_computed_again() -> None:
    again, inputs = count(products(RECOMPUTE))
    kept, kept_bytes = count(products(Action.KEEP))
    moved, moved_bytes = count(products(Action.OFFLOAD))
    # q, k, v, o, gate, up; backward does not need the result of down.
    assert again - kept == 2 * 6
    assert moved == kept
    assert kept_bytes == inputs == 2 * 24 * 32 * 4
    assert moved_bytes - inputs == 2 * 24 * 4 * (32 + 16 + 16 + 32 + 64 + 64)


def test_a_rule_holds_for_its_module_only() -> None:
    _, inputs = count(products(RECOMPUTE))
    _, moved = count(products(Action.OFFLOAD, module="model.layers.1.mlp"))
    assert moved - inputs == 24 * 4 * (64 + 64)


def test_a_layer_that_computes_something_else_the_second_time_is_refused() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return (x.sin() if self.calls == 1 else x.cos()).exp()

    model = Fickle()
    tier = DramTier(CAPACITY)
    offload = ActivationOffload(tier, model, [model], CPU, min_bytes=1)
    contexts = recompute_contexts(offload, SavePolicy(default=RECOMPUTE))
    x = torch.randn(8, requires_grad=True)
    with pytest.raises(TrainingError, match="where its forward did not"), offload.step():
        checkpoint(model, x, use_reentrant=False, context_fn=contexts).sum().backward()
    offload.close()
    tier.close()


def test_changing_a_kept_result_in_place_is_refused() -> None:
    class Changes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin().add_(1).exp()

    model = Changes()
    tier = DramTier(CAPACITY)
    offload = ActivationOffload(tier, model, [model], CPU, min_bytes=1)
    contexts = recompute_contexts(offload, SavePolicy([Rule(Action.KEEP, op="aten.sin.default")], default=RECOMPUTE))
    x = torch.randn(8, requires_grad=True)
    with pytest.raises(TrainingError, match="changes in place"), offload.step():
        checkpoint(model, x, use_reentrant=False, context_fn=contexts).sum().backward()
    offload.close()
    tier.close()
