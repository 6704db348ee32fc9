"""Limits, deadlines, priorities and clients that leave: nobody is served at another's cost, nothing stays behind."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace

import pytest
from tests.unit.serve.in_process import Served, idle

from farspan.serve.keys import parse_key
from farspan.serve.limits import Bucket, Limits
from farspan.serve.shape import ApiError

LONG = {"model": "tiny", "prompt": "x" * 200, "max_tokens": 7000, "temperature": 0, "ignore_eos": True}
SHORT = {"model": "tiny", "prompt": "x", "max_tokens": 2, "temperature": 0, "ignore_eos": True}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_gives_what_a_minute_gives_and_waits_for_its_debts():
    bucket = Bucket(60, 0.0)
    for _ in range(60):
        assert bucket.wait_s(0.0) == 0
        bucket.take(1, 0.0)
    assert bucket.wait_s(0.0) == pytest.approx(1.0)
    assert bucket.wait_s(1.0) == pytest.approx(0)
    bucket.take(121, 1.0)
    assert bucket.wait_s(1.0) == pytest.approx(121)
    # However long it was not asked, a minute's worth is all there is.
    assert bucket.wait_s(1e6) == 0
    bucket.take(60, 1e6)
    assert bucket.wait_s(1e6) == pytest.approx(1.0)


def test_each_key_has_limits_of_its_own_and_is_told_when_to_come_again():
    keys = (parse_key("sk-a requests_per_minute=2", 1), parse_key("sk-b", 2), parse_key("sk-c concurrent=1", 3))
    clock = Clock()
    limits = Limits(keys, clock)
    for _ in range(2):
        with limits.of(keys[0]).admitted():
            pass
    with pytest.raises(ApiError) as refused, limits.of(keys[0]).admitted():
        raise AssertionError("it must not get in")
    assert (refused.value.status, refused.value.retry_after_s) == (429, 30)
    clock.now = 30.0
    with limits.of(keys[0]).admitted(), limits.of(keys[1]).admitted(), limits.of(keys[2]).admitted():
        for _ in range(2):
            with pytest.raises(ApiError, match="1 answers of this key"), limits.of(keys[2]).admitted():
                raise AssertionError("it must not get in")
    with limits.of(keys[2]).admitted():
        pass


@pytest.fixture(scope="module")
def limited(tiny_folder):
    made = Served(tiny_folder, ("sk-one tokens_per_minute=100 priority=-3", "sk-two concurrent=1", "sk-three"))
    yield made
    made.stop()


def test_tokens_of_prompts_and_answers_are_charged_and_the_next_request_waits(limited):
    first = limited.post("/v1/completions", {**SHORT, "prompt": [5] * 70, "max_tokens": 40})
    assert first.status_code == 200, first.text
    second = limited.post("/v1/completions", SHORT)
    assert second.status_code == 429
    assert set(second.json()["error"]) == {"message", "type", "param", "code"}
    assert second.json()["error"]["type"] == "rate_limit_error"
    # 110 of 100 were used; 11 come back within 7 s, less what has passed since.
    assert 1 <= int(second.headers["retry-after"]) <= 7
    assert limited.post("/v1/completions", SHORT, "sk-three").status_code == 200


def test_a_key_at_its_number_of_open_requests_gets_429_until_one_ends(limited):
    async def run() -> list[int]:
        async with limited.http("sk-two") as http:
            slow = asyncio.ensure_future(http.post("/v1/completions", json={**LONG, "max_tokens": 300}))
            while not limited.workers.asked:
                await asyncio.sleep(0.005)
            beside = await http.post("/v1/completions", json=SHORT)
            ended = await slow
            return [beside.status_code, ended.status_code, (await http.post("/v1/completions", json=SHORT)).status_code]

    limited.workers.asked.clear()
    assert asyncio.run(run()) == [429, 200, 200]


def test_a_request_counts_as_many_as_it_has_answers_and_more_than_ever_go_in_are_refused_for_good():
    key = parse_key("sk-a concurrent=4 requests_per_minute=100", 1)
    meter = Limits((key,), Clock()).of(key)
    with meter.admitted(3):
        with pytest.raises(ApiError, match="3 answers of this key") as refused, meter.admitted(2):
            raise AssertionError("it must not get in")
        assert (refused.value.status, refused.value.retry_after_s) == (429, 1)
        with meter.admitted(1):
            pass
    with pytest.raises(ApiError, match="at most 4") as refused, meter.admitted(5):
        raise AssertionError("it must not get in")
    assert (refused.value.status, refused.value.param) == (400, "n")
    with meter.admitted(4):
        pass


@pytest.fixture(scope="module")
def narrow(tiny_folder):
    made = Served(tiny_folder, ("sk-one concurrent=4", "sk-two requests_per_minute=2"))
    yield made
    made.stop()


def test_prompts_times_n_are_what_a_key_may_have_at_the_same_time(narrow):
    statuses = {
        (len(prompts), n): narrow.post("/v1/completions", {**SHORT, "prompt": prompts, "n": n}).status_code
        for prompts, n in ((["x", "y"], 2), (["x"], 4), (["x"], 5), (["x", "y", "z"], 2))
    }
    assert statuses == {(2, 2): 200, (1, 4): 200, (1, 5): 400, (3, 2): 400}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    assert [narrow.post("/v1/chat/completions", {**chat, "n": n}).status_code for n in (4, 5)] == [200, 400]


def test_tokens_and_text_are_told_within_the_limits_of_a_key(narrow):
    asked = [("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [5]})]
    assert [narrow.post(url, body, "sk-two").status_code for url, body in asked] == [200, 200]
    for url, body in asked:
        answer = narrow.post(url, body, "sk-two")
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize(("asked", "expected"), [(-9, 0), (0, 0), (4, -4)])
def test_priority_is_bounded_by_what_a_key_may_ask(limited, asked, expected):
    limited.workers.asked.clear()
    assert limited.post("/v1/completions", {**SHORT, "priority": asked}, "sk-three").status_code == 200
    assert {request.caller.priority for request in limited.workers.asked} == {expected}


def test_requests_of_one_key_are_one_tenant_and_of_two_keys_two(served):
    for key in ("sk-one", "sk-one", "sk-two"):
        served.post("/v1/completions", SHORT, key)
    tenants = [request.caller.tenant for request in served.workers.asked]
    assert len(set(tenants)) == 2
    assert tenants[0] == tenants[2] != tenants[-1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("by", ["the body", "a header", "the endpoint"])
def test_an_answer_that_is_not_whole_at_its_deadline_ends_with_an_error_and_frees_everything(
    served, monkeypatch, stream, by
):
    body = {**LONG, "stream": stream, "deadline_s": 0.4 if by == "the body" else 3600.0}
    headers = {"x-farspan-deadline-s": "0.4"} if by == "a header" else {}
    if by == "the endpoint":
        monkeypatch.setattr(served.api, "_config", replace(served.config, request_timeout_s=0.4))

    async def run():
        async with served.http() as http:
            began = time.monotonic()
            answer = await http.post("/v1/completions", json=body, headers=headers)
            took_s = time.monotonic() - began
        # Seconds of this process, the server in it: others on the machine do not make it late.
        worked = time.process_time()
        await served.settled()
        assert time.process_time() - worked < 1.0
        return answer, took_s

    answer, took_s = asyncio.run(run())
    assert 0.3 < took_s < 20
    if stream:
        assert answer.status_code == 200
        last = answer.text.strip().split("\n\n")[-1]
        error = json.loads(last.removeprefix("data: "))["error"]
    else:
        assert answer.status_code == 504
        error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("deadline_exceeded", "timeout_error")


def test_the_time_of_a_request_begins_with_its_first_bytes(served, monkeypatch):
    monkeypatch.setattr(served.api, "_config", replace(served.config, request_timeout_s=0.2))

    async def slowly():
        content = json.dumps(SHORT).encode()
        yield content[:5]
        await asyncio.sleep(0.3)
        yield content[5:]

    async def run():
        async with served.http() as http:
            return await http.post("/v1/completions", content=slowly())

    answer = asyncio.run(run())
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")


@pytest.mark.parametrize("header", ["soon", "0", "-1", "nan", "inf"])
def test_a_deadline_that_is_no_time_is_refused(served, header):
    answer = served.post("/v1/completions", SHORT, headers={"x-farspan-deadline-s": header})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-farspan-deadline-s")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("leaves", ["after the first token", "before it"])
def test_a_client_that_leaves_frees_everything_within_a_second(served, stream, n, leaves):
    body = json.dumps({**LONG, "stream": stream, "n": n}).encode()

    async def run() -> None:
        gone, sent = asyncio.Event(), []

        async def receive():
            if not sent:
                sent.append("body")
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        call = asyncio.ensure_future(served.app(scope(), receive, send))
        if leaves == "before it":
            while not any(info.num_requests for info in await served.workers.info()):
                await asyncio.sleep(0)
        else:
            while (await served.workers.info())[1].num_requests < n:
                await asyncio.sleep(0.001)
        gone.set()
        began = time.process_time()
        await asyncio.wait_for(call, 30)
        await served.settled()
        assert time.process_time() - began < 1.0
        assert all(idle(info) for info in await served.workers.info())

    asyncio.run(run())


def scope() -> dict:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(b"authorization", b"Bearer sk-one"), (b"content-type", b"application/json")],
        "client": ("test", 1),
        "server": ("test", 80),
    }
