"""Which failures are forgiven."""

from __future__ import annotations

from farspan.jobs.restart import WINDOW_S, Failure, RestartBudget

DIED = Failure("ActorDiedError: gone", 5, died=True)


def test_so_many_losses_are_forgiven_in_an_hour_and_no_more() -> None:
    budget = RestartBudget(2)
    assert [budget.refusal(DIED, now) for now in (0.0, 1.0)] == [None, None]
    assert "train.max_restarts=2" in (budget.refusal(DIED, 2.0) or "")


def test_a_loss_is_forgotten_after_an_hour() -> None:
    budget = RestartBudget(1)
    assert budget.refusal(DIED, 0.0) is None
    assert budget.refusal(DIED, WINDOW_S - 1) is not None
    assert budget.refusal(DIED, WINDOW_S + 1) is None


def test_the_same_words_at_the_same_step_from_a_living_process_are_a_defect() -> None:
    budget = RestartBudget(9)
    failed = Failure("RuntimeError: shapes", 5, died=False)
    assert budget.refusal(failed, 0.0) is None
    assert budget.refusal(Failure("RuntimeError: shapes", 6, died=False), 1.0) is None
    assert budget.refusal(failed, 2.0) is None
    assert "failed twice in the same way after step 5" in (budget.refusal(failed, 3.0) or "")
