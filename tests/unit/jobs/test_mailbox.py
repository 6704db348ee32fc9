"""A watcher's long question is answered at once when there is an event, and when the watcher has something to tell."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from farspan.jobs.mailbox import EventMailbox

_LONG_S, _DEADLINE_S = 3600.0, 30.0


def _within_deadline(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, _DEADLINE_S))


def test_a_question_that_waits_is_answered_by_the_next_event() -> None:
    async def story() -> None:
        mailbox = EventMailbox()
        asked = asyncio.create_task(mailbox.take(0, None, _LONG_S))
        await asyncio.sleep(0)
        assert await mailbox.put("a") is None
        assert await asked == (1, ["a"])

    _within_deadline(story())


def test_a_wish_that_comes_while_a_question_waits_reaches_the_next_event_and_no_event_is_lost() -> None:
    async def story() -> None:
        mailbox = EventMailbox()
        asked = asyncio.create_task(mailbox.take(0, None, _LONG_S))
        await asyncio.sleep(0)
        await mailbox.hurry("SIGTERM")
        assert await asked == (0, [])
        assert await mailbox.put("a") == "SIGTERM"
        assert await mailbox.take(0, "SIGTERM", _LONG_S) == (1, ["a"])

    _within_deadline(story())


def test_a_hurry_that_comes_between_two_questions_answers_the_next_one_and_only_that() -> None:
    async def story() -> None:
        mailbox = EventMailbox()
        await mailbox.hurry(None)
        assert await mailbox.take(0, None, _LONG_S) == (0, [])
        asked = asyncio.create_task(mailbox.take(0, None, _LONG_S))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not asked.done()
        await mailbox.put("a")
        assert await asked == (1, ["a"])

    _within_deadline(story())
