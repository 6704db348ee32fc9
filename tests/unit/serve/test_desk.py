"""A desk passes asks and answers on, and keeps neither for somebody who has gone."""

from __future__ import annotations

import asyncio

import pytest

from farspan.serve.desk import Desk

PATIENT_S = 60.0


def test_an_ask_gets_the_answer_to_its_number_whatever_the_order():
    async def run() -> None:
        desk = Desk()
        asking = [asyncio.create_task(desk.ask([page], page == 1, PATIENT_S)) for page in range(3)]
        await asyncio.sleep(0)
        asks = await desk.asked(PATIENT_S)
        assert [(ask.pages, ask.of_epochs) for ask in asks] == [([0], False), ([1], True), ([2], False)]
        for ask in reversed(asks):
            await desk.answer(ask.number, f"of {ask.pages[0]}")
        assert await asyncio.gather(*asking) == ["of 0", "of 1", "of 2"]
        assert await desk.asked(0.0) == []

    asyncio.run(run())


def test_a_process_that_looks_first_hears_what_is_asked_later():
    async def run() -> None:
        desk = Desk()
        looking = asyncio.create_task(desk.asked(PATIENT_S))
        await asyncio.sleep(0)
        asking = asyncio.create_task(desk.ask([5], of_epochs=False, within_s=PATIENT_S))
        (ask,) = await looking
        await desk.answer(ask.number, [5])
        assert await asking == [5]

    asyncio.run(run())


def test_an_ask_that_nobody_waits_for_any_more_is_not_told_and_its_answer_is_not_kept():
    async def run() -> None:
        desk = Desk()
        with pytest.raises(TimeoutError):
            await desk.ask([0], of_epochs=False, within_s=0.0)
        asking = asyncio.create_task(desk.ask([1], of_epochs=False, within_s=PATIENT_S))
        await asyncio.sleep(0)
        (ask,) = await desk.asked(PATIENT_S)
        assert ask.pages == [1]
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await desk.answer(ask.number, "late")
        assert desk._waiting == {}

    asyncio.run(run())
