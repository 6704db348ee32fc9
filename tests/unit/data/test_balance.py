"""Documents of a step over ranks: a partition within capacity, deadlock-free, and balanced where a mesh is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farspan.data.balance import Cost, MicroBatch, Spill, StepPlan, balance
from farspan.data.pack import PackPlan
from farspan.errors import ConfigError

# Seconds of a 7B model's forward and backward on an accelerator, roughly: what matters is that both terms do.
COST = Cost(quadratic=2.0e-9, linear=1.4e-4, fixed=2e-3)
# Seconds that parallel.hdp_cost=measured found, of 4 layers of 256 on one processor; and what makes every term matter.
MEASURED = Cost(quadratic=5.4e-7, linear=1.14e-3, fixed=0.09)
WITH_MESSAGES = Cost(quadratic=4e-8, linear=2e-4, fixed=5e-3, each=4e-4, message=2e-3, travel=3e-6)
ROUNDING = 1e-9


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """(document lengths, ranks, capacity) that fit."""
    num_ranks, capacity = draw(st.integers(1, 9)), draw(st.integers(1, 500))
    lengths = draw(st.lists(st.integers(1, capacity * num_ranks), min_size=1, max_size=40))
    return lengths, num_ranks, capacity


def once(plan: StepPlan) -> list[MicroBatch]:
    """Every micro-batch, a shared one once."""
    return [micro for rank, own in enumerate(plan.work) for micro in own if micro.ranks[0] == rank]


@given(steps())
def test_every_document_is_computed_exactly_once_by_ranks_that_all_know_of_it(step: tuple[list[int], int, int]) -> None:
    lengths, num_ranks, capacity = step
    plan = balance(lengths, num_ranks, capacity, COST)
    assert sorted(d for micro in once(plan) for d in micro.documents) == list(range(len(lengths)))
    for rank, own in enumerate(plan.work):
        for micro in own:
            assert rank in micro.ranks
            assert list(micro.ranks) == sorted(set(micro.ranks))
            assert all(micro in plan.work[other] for other in micro.ranks)


@given(steps())
def test_no_rank_holds_more_than_its_capacity_and_what_fits_one_rank_is_not_shared(
    step: tuple[list[int], int, int],
) -> None:
    lengths, num_ranks, capacity = step
    for micro in once(balance(lengths, num_ranks, capacity, COST)):
        tokens = sum(lengths[d] for d in micro.documents)
        assert tokens <= capacity * len(micro.ranks)
        assert micro.shared == any(lengths[d] > capacity for d in micro.documents)
        assert not micro.shared or len(micro.documents) == 1
        assert micro.spilled == 0


@given(steps())
def test_ranks_that_wait_only_for_each_other_run_to_the_end(step: tuple[list[int], int, int]) -> None:
    plan = balance(*step, COST)
    todo = [list(own) for own in plan.work]
    while any(todo):
        ready = [own[0] for own in todo if own and all(todo[r] and todo[r][0] is own[0] for r in own[0].ranks)]
        assert ready, "every rank waits"
        for rank in ready[0].ranks:
            todo[rank].pop(0)


@given(steps())
def test_equal_inputs_give_equal_plans(step: tuple[list[int], int, int]) -> None:
    assert balance(*step, COST) == balance(*step, COST)


@given(steps())
def test_what_ranks_are_told_to_do_costs_what_the_documents_cost(step: tuple[list[int], int, int]) -> None:
    lengths, num_ranks, capacity = step
    plan = balance(lengths, num_ranks, capacity, COST)
    fixed = sum(len(micro.ranks) for micro in once(plan)) * COST.fixed
    assert sum(plan.costs) == pytest.approx(sum(map(COST.document, lengths)) + fixed)
    assert max(plan.costs) <= plan.finish * (1 + ROUNDING)


def test_a_document_longer_than_all_ranks_together_is_refused_with_the_capacity_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.rank_tokens=1001"):
        balance([10, 4001], 4, 1000, COST)


def test_a_document_gets_the_ranks_its_length_needs_be_they_a_power_of_two_or_not() -> None:
    plan = balance([5000, *[300] * 400], 7, 1000, COST)
    (shared,) = [micro for micro in once(plan) if micro.shared]
    assert len(shared.ranks) == 5


def long_tailed(name: str, seed: int) -> list[int]:
    """Lengths of 4096 documents: most are short, a few fill several ranks."""
    generator = np.random.Generator(np.random.PCG64(seed))
    size = 4096
    drawn = generator.lognormal(7.5, 1.6, size) if name == "log-normal" else 600 * (1 + generator.pareto(1.1, size))
    return [int(x) for x in np.clip(drawn, 16, 256 * 1024)]


def static_mesh(
    lengths: Sequence[int], seed: int, num_ranks: int, sp: int, tokens: int, cost: Cost
) -> tuple[float, float]:
    """The same documents packed into sequences of `tokens` on a mesh of num_ranks / sp of them side by side: costliest
    rank over the mean, and the same when all wait for the costliest after each micro-batch.
    """
    plan, num_groups = PackPlan(lengths, tokens, seed), num_ranks // sp
    # A sequence's work is taken to be spread evenly over its ranks, which is the best a mesh can do.
    costs = [
        sum(cost.document(piece.num_tokens) for piece in plan.sequence(index)) / sp + cost.fixed
        for index in range(plan.round_tokens // tokens // num_groups * num_groups)
    ]
    loads_SG = np.array(costs).reshape(-1, num_groups)
    mean = loads_SG.sum() / num_groups
    return loads_SG.sum(0).max() / mean, loads_SG.max(1).sum() / mean


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["log-normal", "pareto"])
@pytest.mark.parametrize("cost", [COST, MEASURED, WITH_MESSAGES], ids=["counted", "measured", "with messages"])
def test_long_tailed_lengths_are_balanced_within_a_twentieth(cost: Cost, name: str, seed: int) -> None:
    lengths = long_tailed(name, seed)
    plan = balance(lengths, 32, 32 * 1024, cost)
    mesh, mesh_waiting = static_mesh(lengths, seed, 32, 8, 256 * 1024, cost)
    waiting = plan.finish * 32 / sum(plan.costs)
    print(
        f"{name} seed {seed}: {sum(lengths) / 1e6:.1f} M tokens, max/mean {plan.imbalance:.4f}, "
        f"with waiting {waiting:.4f}; static mesh 4 x 8: {mesh:.3f}, with waiting {mesh_waiting:.3f}"
    )
    assert plan.imbalance <= 1.05
    assert mesh > plan.imbalance
    assert mesh_waiting > waiting


def test_a_document_gets_no_rank_whose_messages_cost_more_than_it_saves() -> None:
    lengths, free = [4000, *[10] * 20], Cost(quadratic=1e-6, linear=1e-3)
    costly = replace(free, message=2.0)
    found = {}
    for name, cost in (("free", free), ("costly", costly)):
        (shared,) = [micro for micro in once(balance(lengths, 16, 1000, cost)) if micro.shared]
        found[name] = len(shared.ranks)
    assert found == {"free": 16, "costly": 4}
    assert costly.shared(4000, 4) < costly.shared(4000, 5)


def test_micro_batches_differ_in_number_from_rank_to_rank() -> None:
    plan = balance([900, 900, *[30] * 100], 4, 1000, Cost(1e-3, 1e-3))
    assert len({len(own) for own in plan.work}) > 1


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=12), st.floats(0.0, 0.95))
def test_spilled_activations_never_leave_more_on_a_rank_than_it_holds(lengths: list[int], share: float) -> None:
    spill = Spill(forward_s=Cost(0.0, 1.0), kept_bytes=1.0, bytes_per_s=share, most=0.9)
    plan = balance(lengths, 8, 500, COST, spill)
    for micro in once(plan):
        tokens = sum(lengths[d] for d in micro.documents)
        assert tokens * (1 - micro.spilled) <= 500 * len(micro.ranks) * (1 + ROUNDING)
        assert micro.spilled <= min(share, 0.9) + ROUNDING


def test_a_long_document_whose_copies_hide_behind_its_forward_needs_fewer_ranks() -> None:
    # Forward takes s^2 seconds and 100 s bytes leave at 1 byte/s: at 50 tokens a half is hidden, at 90 the most.
    spill = Spill(forward_s=Cost(1.0, 0.0), kept_bytes=100.0, bytes_per_s=1.0, most=0.8)
    assert [spill.share(s) for s in (25, 50, 90)] == [0.25, 0.5, 0.8]
    cheap = Cost(0.0, 1.0)
    ranks = {
        tokens: len(balance([tokens, *[1] * 900], 9, 10, cheap, spill).work[0][0].ranks) for tokens in (25, 50, 90)
    }
    plain = {tokens: len(balance([tokens, *[1] * 900], 9, 10, cheap).work[0][0].ranks) for tokens in (25, 50, 90)}
    assert plain == {25: 3, 50: 5, 90: 9}
    assert ranks == {25: 2, 50: 3, 90: 2}
