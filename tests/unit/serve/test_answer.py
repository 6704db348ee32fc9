"""The story of a request: whatever fails on the way, the client sees every token once and in order."""

from __future__ import annotations

import asyncio

import pytest

from farspan.config.schema import ServeConfig, TransferConfig
from farspan.engine.detokenize import AnswerText
from farspan.engine.request import SamplingParams
from farspan.errors import ClusterError, RequestError, TransferError
from farspan.kv.ticket import KvTicket, SourceAddress
from farspan.serve.chat import answer
from farspan.serve.messages import Failed, GenerationRequest, Prefilled, Pulled, Tokens
from farspan.serve.policy import Route
from farspan.serve.trace import RequestTrace, TraceBook
from farspan.serve.ways import LengthWays

ANSWER = tuple(range(100, 112))
TICKET = KvTicket("t", "r", SourceAddress("memory", "i", b"", 0, 0, 4), (), 3, "layout", 64, 1e12)
LOST = Failed(ClusterError("the decode worker was lost: ActorDiedError"))
BROKEN = Failed(TransferError("r", "the connection to the source broke"))


class Words:
    """A detokenizer that shows numbers."""

    def push(self, tokens):
        return "".join(f"<{token}>" for token in tokens)

    def finish(self):
        return ""


class FakeWorkers:
    """Answers `ANSWER`; attempt i fails with failures[i] after `lengths[i]` more tokens.

    `apart`: after a failure a prompt is computed on a worker of its own again.
    """

    def __init__(self, failures=(), lengths=(), prefill_failure=None, apart=False) -> None:
        self.failures, self.lengths, self.prefill_failure = failures, lengths, prefill_failure
        self.apart, self.num_prefills = apart, 0
        self.attempts: list[tuple[int, bool]] = []
        self.names: list[str] = []
        self.released: list[str] = []
        self.cancelled: list[str] = []

    async def prefill(self, request):
        self.num_prefills += 1
        return self.prefill_failure or Prefilled(ANSWER[0], None, TICKET, 0.5)

    def reroute(self, request, *, begun):
        assert begun == bool(self.attempts or not self.prefill_failure)
        return self.apart

    async def resume(self, request, answered, ticket):
        number = len(self.attempts)
        self.attempts.append((len(answered), ticket is not None))
        self.names.append(request.request_id)
        assert answered == ANSWER[: len(answered)]
        if ticket is not None and not (number < len(self.failures) and self.lengths[number] == 0):
            yield Pulled(2, 128, 0.25, "memory", digest="0a1b", room_s=0.5)
        failing = number < len(self.failures)
        rest = ANSWER[len(answered) :][: self.lengths[number] if failing else None]
        for index, token in enumerate(rest):
            last = not failing and index == len(rest) - 1
            yield Tokens((token,), "length" if last else None)
        if failing:
            yield self.failures[number]

    def release(self, ticket_id):
        self.released.append(ticket_id)

    def cancel(self, request_id):
        self.cancelled.append(request_id)


def tell(workers, *, split=True, stops=(), take=None):
    trace = RequestTrace("r", 3)
    request = GenerationRequest("r", (1, 2, 3), SamplingParams(max_tokens=len(ANSWER)))

    async def run():
        deltas = answer(request, Route(split, "test"), workers, AnswerText(Words(), stops), trace)
        text, finish = "", None
        try:
            async for delta in deltas:
                text, finish = text + delta.text, delta.finish
                if take is not None and delta.num_tokens >= take:
                    break
        finally:
            await deltas.aclose()
        return text, finish

    return *asyncio.run(run()), trace


WHOLE = Words().push(ANSWER)


def test_an_undisturbed_answer_is_prefilled_pulled_and_released_once():
    workers = FakeWorkers()
    text, finish, trace = tell(workers)
    assert (text, finish) == (WHOLE, "length")
    assert workers.attempts == [(1, True)]
    assert (workers.released, workers.cancelled) == (["t"], [])
    assert (trace.recovered, trace.kv_bytes, trace.transport, trace.prefill_s) == (False, 128, "memory", 0.5)
    report = trace.report()
    assert (report["output_tokens"], report["kv_digest"]) == (len(ANSWER), "0a1b")
    assert (report["page_wait_s"], report["transfer_s"]) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("workers", "attempts", "released"),
    [
        (FakeWorkers([BROKEN], [0]), [(1, True), (1, False)], ["t"]),
        (FakeWorkers([LOST], [4]), [(1, True), (5, False)], ["t"]),
        (FakeWorkers([BROKEN, LOST], [0, 3]), [(1, True), (1, False), (4, False)], ["t"]),
        (FakeWorkers(prefill_failure=LOST), [(0, False)], []),
    ],
)
def test_a_failure_at_any_point_leaves_the_answer_exact_and_the_ticket_given_back(workers, attempts, released):
    text, finish, trace = tell(workers)
    assert (text, finish, trace.recovered) == (WHOLE, "length", True)
    assert workers.attempts == attempts
    assert workers.released == released


@pytest.mark.parametrize(
    ("workers", "attempts", "num_prefills"),
    [
        (FakeWorkers([BROKEN], [0], apart=True), [(1, True), (1, True)], 2),
        (FakeWorkers([LOST], [4], apart=True), [(1, True), (5, True)], 2),
        # Twice without a token in between: then where it decodes.
        (FakeWorkers([BROKEN, LOST], [0, 0], apart=True), [(1, True), (1, True), (1, False)], 2),
        (FakeWorkers([LOST, LOST], [2, 2], apart=True), [(1, True), (3, True), (5, True)], 3),
        (FakeWorkers(prefill_failure=LOST, apart=True), [(0, False)], 2),
    ],
)
def test_a_prompt_is_computed_apart_again_where_that_is_chosen_and_the_answer_stays_exact(
    workers, attempts, num_prefills
):
    text, finish, trace = tell(workers)
    assert (text, finish, trace.recovered) == (WHOLE, "length", True)
    assert (workers.attempts, workers.num_prefills) == (attempts, num_prefills)
    assert workers.released == ["t"] * sum(fetched for _, fetched in attempts)


def test_a_worker_that_was_lost_is_told_to_stop_and_the_next_attempt_has_another_name():
    workers = FakeWorkers([BROKEN, LOST], [0, 3])
    tell(workers)
    # Whoever says itself that it failed holds nothing; who was lost may wake.
    assert workers.names == ["r", "r", "r~1"]
    assert workers.cancelled == ["r"]
    workers = FakeWorkers([LOST], [4], prefill_failure=LOST)
    tell(workers)
    assert workers.names == ["r~1", "r~2"]
    assert workers.cancelled == ["r", "r~1"]


def test_workers_that_fail_every_time_end_the_answer_with_their_error():
    workers = FakeWorkers([BROKEN, LOST, LOST], [0, 0, 0])
    with pytest.raises(ClusterError, match="decode worker was lost"):
        tell(workers)
    assert len(workers.attempts) == 3
    assert (workers.released, workers.cancelled) == (["t"], ["r", "r~1"])


def test_only_attempts_that_bring_no_token_are_counted_and_only_those_in_a_row():
    workers = FakeWorkers([LOST] * 8, [2, 0, 0, 1, 2, 0, 0, 1])
    text, finish, trace = tell(workers)
    assert (text, finish, len(trace.recoveries)) == (WHOLE, "length", 8)
    workers = FakeWorkers([LOST] * 4, [2, 0, 0, 0])
    with pytest.raises(ClusterError, match="decode worker was lost"):
        tell(workers)
    assert workers.attempts == [(1, True), (3, False), (3, False), (3, False)]


def test_a_request_nobody_can_answer_is_not_tried_again():
    workers = FakeWorkers(prefill_failure=Failed(RequestError("r", "the prompt is empty")))
    with pytest.raises(RequestError, match="empty"):
        tell(workers)
    assert workers.attempts == []


def test_a_stop_string_or_a_lost_client_cancels_the_workers():
    stopped = FakeWorkers()
    text, finish, _ = tell(stopped, stops=["<104>"])
    assert (text, finish) == (Words().push(ANSWER[:4]), "stop")
    assert (stopped.cancelled, stopped.released) == (["r"], ["t"])
    gone = FakeWorkers()
    tell(gone, take=1)
    assert (gone.cancelled, gone.released) == (["r"], ["t"])


def test_short_prompts_stay_where_they_are_decoded():
    workers = FakeWorkers()

    def split(num_prompt: int, below: int) -> bool:
        config = ServeConfig(model="m", transfer=TransferConfig(colocate_below_tokens=below))
        return LengthWays(workers, config).way(GenerationRequest("r", (1,) * num_prompt, SamplingParams())).split

    assert (split(9, 10), split(10, 10), split(1, 0)) == (False, True, True)
    text, _, trace = tell(workers, split=False)
    assert (text, trace.route) == (WHOLE, "colocated")
    assert workers.attempts == [(0, False)]


def test_traces_are_found_by_either_id_and_forgotten_in_time():
    book = TraceBook()
    for number in range(1001):
        book.open(f"r{number}", 1)
    assert book.find("r0") is None
    assert book.find("cmpl-r5") is book.find("chatcmpl-r5") is book.find("r5") is not None
