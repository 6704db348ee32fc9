"""A served answer equals transformers' generate, whatever happens to the workers on the way."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import openai
import pytest
import torch
from tests.unit.serve.tiny_folder import TEXT, write_tiny_model

from farspan.config.schema import EngineConfig, ServeConfig, TransferConfig
from farspan.engine.detokenize import AnswerText, Detokenizer
from farspan.engine.request import SamplingParams
from farspan.models.checkpoint import load_causal_lm, load_tokenizer
from farspan.serve.app import Running, handle_for_threads, run_app
from farspan.serve.chat import answer
from farspan.serve.messages import GenerationRequest, Tokens
from farspan.serve.policy import Route
from farspan.serve.port import free_port
from farspan.serve.relay import Relay
from farspan.serve.router import Router
from farspan.serve.trace import RequestTrace

MAX_TOKENS = 24
BODY_LIMIT = 200_000
# One second is what is promised; the rest is for asking two workers how they are, on a machine that does other things.
FREED_S = 3.0


@dataclass(frozen=True)
class Server:
    running: Running
    config: ServeConfig
    folder: Path
    key: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.running.url, api_key=self.key, timeout=120, max_retries=0)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def trace(self, answer_id: str) -> dict:
        found = httpx.get(f"{self.running.url}/requests/{answer_id}/trace", headers=self.headers)
        assert found.status_code == 200, found.text
        return found.json()

    def infos(self) -> dict:
        handles = [handle_for_threads(name) for name in ("prefill", "decode")]
        return {info.role: info for info in (handle.info.remote().result(timeout_s=60) for handle in handles)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("served") / "tiny"
    write_tiny_model(made)
    return made


@pytest.fixture(scope="module")
def server(ray_cluster, folder, tmp_path_factory) -> Iterator[Server]:
    key_file = tmp_path_factory.mktemp("keys") / "keys"
    key_file.touch(mode=0o600)
    key_file.write_text("sk-first\nsk-second\n")
    config = ServeConfig(
        model=str(folder),
        port=free_port(),
        api_key_file=str(key_file),
        max_body_bytes=BODY_LIMIT,
        engine=EngineConfig(dtype="float64", kv_bytes=64 * 1024 * 1024, max_batch_tokens=512),
        transfer=TransferConfig(deadline_s=10, lease_s=50, split="always"),
        start_timeout_s=120,
    )
    with run_app(config) as running:
        yield Server(running, config, folder, "sk-second")


@pytest.fixture(scope="module")
def plain(folder):
    """Greedy text and tokens of transformers' own generate."""
    model, tokenizer = load_causal_lm(folder, torch.float64), load_tokenizer(folder)

    def generate(prompt: str) -> tuple[list[int], str, list[int]]:
        prompt_ids = tokenizer(prompt)["input_ids"]
        out = model.generate(
            torch.tensor([prompt_ids]),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        tokens = out[0, len(prompt_ids) :].tolist()
        assert len(set(tokens)) >= 6, f"a vacuous reference: {tokens}"
        return tokens, tokenizer.decode(tokens, skip_special_tokens=True), prompt_ids

    return generate


@pytest.mark.parametrize("num_chars", [1, 40, 300, 2000, 9000])
def test_streamed_greedy_text_equals_generate(server, plain, num_chars):
    prompt = TEXT[100 : 100 + num_chars]
    tokens, expected, prompt_ids = plain(prompt)
    stream = server.client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == expected
    assert chunks[-1].usage.prompt_tokens == len(prompt_ids)
    assert chunks[-1].usage.completion_tokens == len(tokens)
    assert chunks[-2].choices[0].finish_reason == ("length" if len(tokens) == MAX_TOKENS else "stop")
    if num_chars == 9000:
        assert len(prompt_ids) > 2048
    trace = server.trace(chunks[0].id)
    assert (trace["recovered"], trace["transport"], trace["route"]) == (False, "nixl", "split")
    assert trace["prompt_tokens"] == len(prompt_ids)
    assert trace["output_tokens"] == len(tokens)
    page_bytes = 2 * 16 * 2 * (16 + 16) * 8
    assert trace["kv_pages"] == -(-len(prompt_ids) // 16)
    assert trace["kv_bytes"] == trace["kv_pages"] * page_bytes
    if num_chars == 9000:
        # All but the last part of 512 tokens was fetched while the next one was computed.
        assert trace["kv_pages"] - trace["kv_pages_early"] <= 512 // 16 + 1
    assert 0 < trace["queue_s"] < trace["queue_s"] + trace["prefill_s"] <= trace["time_to_first_token_s"]


def test_chat_uses_the_models_template_and_whole_answers_equal_streamed_ones(server, plain):
    _, expected, prompt_ids = plain("user: def\nassistant:")
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "def"}],
        "max_completion_tokens": MAX_TOKENS,
        "temperature": 0,
        "extra_body": {"some_unknown_field": {"a": 1}},
    }
    raw = server.client.chat.completions.with_raw_response.create(**asked)
    whole = raw.parse()
    assert whole.id == f"chatcmpl-{raw.headers['x-request-id']}"
    assert server.trace(raw.headers["x-request-id"]) == server.trace(whole.id)
    assert whole.choices[0].message.content == expected
    assert whole.usage.prompt_tokens == len(prompt_ids)
    streamed = server.client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == expected


def test_many_requests_at_once_each_get_their_own_answer(server, plain):
    asked = [TEXT[start : start + 150 + start % 400] for start in range(0, 4000, 400)]
    expected = [plain(prompt)[1] for prompt in asked]

    async def all_at_once() -> list[str]:
        client = openai.AsyncOpenAI(base_url=server.running.url, api_key=server.key, timeout=120, max_retries=0)
        calls = [
            client.completions.create(model="tiny", prompt=prompt, max_tokens=MAX_TOKENS, temperature=0)
            for prompt in asked
        ]
        return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

    assert asyncio.run(all_at_once()) == expected


def test_a_stop_string_ends_the_answer_before_it(server, plain):
    _, expected, _ = plain(TEXT[500:700])
    stop = expected[7:9]
    answer = server.client.completions.create(
        model="tiny", prompt=TEXT[500:700], max_tokens=MAX_TOKENS, temperature=0, stop=[stop]
    )
    assert answer.choices[0].text == expected[: expected.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_requests_that_cannot_be_served_are_refused_in_openais_shape(server):
    url, good = f"{server.running.url}/completions", {"model": "tiny", "prompt": "x", "max_tokens": 2}

    def post(body, headers=None):
        sent = body if isinstance(body, bytes) else None
        answer = httpx.post(
            url, content=sent, json=None if sent is not None else body, headers=headers or server.headers, timeout=60
        )
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, answer.text
        return answer.status_code, answer.json()["error"]["message"]

    assert post(good, {"X-Nothing": "1"})[0] == 401
    assert post(good, {"Authorization": "Bearer sk-wrong"})[0] == 401
    assert httpx.get(f"{server.running.url}/models").status_code == 401
    assert post({**good, "prompt": "x" * BODY_LIMIT})[0] == 413
    assert post({**good, "model": "other"})[0] == 404
    assert post(b"{not json")[0] == 400
    assert post(b"\xff\xfe")[0] == 400
    for field, value in [("temperature", 9), ("top_p", 0), ("max_tokens", 0), ("n", 1000), ("prompt", {"a": 1})]:
        status, message = post({**good, field: value})
        assert (status, field in message) == (400, True), message
    assert post({**good, "prompt": []}) == (400, "the prompt is empty; give at least one token")
    assert post({**good, "prompt": [100000]})[0] == 400
    status, message = post({**good, "prompt": [5] * 9000})
    assert status == 400
    assert "at most 8191" in message
    with pytest.raises(openai.NotFoundError):
        server.client.completions.create(model="other", prompt="x")
    assert server.client.models.list().data[0].id == "tiny"


def test_a_client_that_goes_away_frees_its_pages_within_a_second(server):
    asked = {"model": "tiny", "prompt": TEXT[:600], "max_tokens": 6000, "ignore_eos": True}
    url = f"{server.running.url}/completions"
    with httpx.stream("POST", url, json={**asked, "stream": True}, headers=server.headers, timeout=60) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        wait_until(lambda: server.infos()["decode"].num_requests == 1)
        assert server.infos()["decode"].num_free < server.infos()["decode"].num_pages
    wait_until(lambda: all(idle(info) for info in server.infos().values()), FREED_S)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            url, json=asked, headers={**server.headers, "x-request-id": "left"}, timeout=httpx.Timeout(60, read=1.5)
        )
    wait_until(lambda: all(idle(info) for info in server.infos().values()), FREED_S)
    left = server.trace("left")
    assert (left["output_tokens"] > 0, left["finish"]) == (True, None)


def test_a_prefill_worker_killed_before_the_pull_is_not_noticed_by_the_client(server, plain):
    expected_tokens, expected, prompt_ids = plain(TEXT[1000:1900])
    killed = server.infos()["prefill"].pid

    class Murderous(Router):
        """Kills the prefill worker after it handed out its ticket."""

        async def resume(self, request, answered, ticket):
            if ticket is not None:
                os.kill(killed, signal.SIGKILL)
                while Path(f"/proc/{killed}").exists():
                    await asyncio.sleep(0.01)
            async for item in super().resume(request, answered, ticket):
                yield item

    text, trace = drive(server, prompt_ids, Murderous)
    assert text == expected
    assert trace.recovered, trace
    assert "KV transfer failed" in trace.recoveries[0]
    assert trace.arrivals.count == len(expected_tokens)
    # While no prefill worker is there, the decode worker does it all: nobody waits for the replacement.
    again = server.client.completions.create(model="tiny", prompt=TEXT[1000:1900], max_tokens=MAX_TOKENS, temperature=0)
    assert again.choices[0].text == expected
    wait_until(lambda: server.infos()["prefill"].pid != killed)
    wait_until(lambda: all(idle(info) for info in server.infos().values()))


@pytest.mark.soak
def test_a_prefill_worker_killed_while_its_pages_are_fetched_is_not_noticed_by_the_client(server, plain, monkeypatch):
    _, expected, prompt_ids = plain(TEXT[100:9100])
    killed = server.infos()["prefill"].pid

    class Murderous(Relay):
        """Kills the prefill worker when it has offered its first pages."""

        def tell(self, offer):
            super().tell(offer)
            if Path(f"/proc/{killed}").exists():
                os.kill(killed, signal.SIGKILL)

    monkeypatch.setattr("farspan.serve.router.Relay", Murderous)
    text, trace = drive(server, prompt_ids, Router)
    assert text == expected
    assert "prefill worker was lost" in trace.recoveries[0]
    wait_until(lambda: server.infos()["prefill"].pid != killed)
    wait_until(lambda: all(idle(info) for info in server.infos().values()))


def test_a_decode_worker_killed_in_the_middle_of_an_answer_is_not_noticed_by_the_client(server, plain):
    expected_tokens, expected, prompt_ids = plain(TEXT[3000:3900])
    killed = server.infos()["decode"].pid
    given: list[int] = []

    class Murderous(Router):
        """Kills the decode worker after it gave a few tokens."""

        async def resume(self, request, answered, ticket):
            given.append(len(answered))
            async for item in super().resume(request, answered, ticket):
                yield item
                if len(given) == 1 and isinstance(item, Tokens) and Path(f"/proc/{killed}").exists():
                    os.kill(killed, signal.SIGKILL)
                    while Path(f"/proc/{killed}").exists():
                        await asyncio.sleep(0.01)

    text, trace = drive(server, prompt_ids, Murderous)
    assert text == expected
    assert trace.recovered, trace
    assert "decode worker was lost" in trace.recoveries[0]
    # The second attempt went on after tokens that the killed worker had given.
    assert 1 < given[1] < len(expected_tokens)
    assert trace.arrivals.count == len(expected_tokens)
    wait_until(lambda: server.infos()["decode"].pid != killed)
    wait_until(lambda: all(idle(info) for info in server.infos().values()))


def test_a_decode_worker_frozen_in_the_middle_of_an_answer_is_not_noticed_by_the_client_and_may_wake(server, plain):
    _, begins, _ = plain(TEXT[3500:4400])
    asked = {"model": "tiny", "prompt": TEXT[3500:4400], "max_tokens": 400, "temperature": 0}
    asked["extra_body"] = {"ignore_eos": True}
    expected = server.client.completions.create(**asked).choices[0].text
    assert expected.startswith(begins)
    frozen = server.infos()["decode"].pid
    stream = iter(server.client.completions.create(**asked, stream=True))
    first = next(stream)
    os.kill(frozen, signal.SIGSTOP)
    try:
        text = first.choices[0].text + "".join(chunk.choices[0].text for chunk in stream)
    finally:
        os.kill(frozen, signal.SIGCONT)
    assert text == expected
    assert any("silent" in reason for reason in server.trace(first.id)["recoveries"])
    # What it still computes for somebody who went elsewhere it gives up.
    wait_until(lambda: all(idle(info) for info in server.infos().values()))


def test_choices_and_their_logprobs_go_on_over_http_when_their_decode_worker_is_killed(server):
    # More than what lies between a worker and a client that reads slowly.
    num_tokens = 500

    def ask(kill: int | None) -> dict[int, list]:
        """(text, log-probability) of every token told, choice by choice."""
        told: dict[int, list] = {0: [], 1: [], 2: []}
        stream = server.client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": TEXT[:300]}],
            n=3,
            seed=7,
            max_tokens=num_tokens,
            logprobs=True,
            top_logprobs=2,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for number, chunk in enumerate(stream):
            choice = chunk.choices[0]
            told[choice.index] += [(one.token, one.logprob) for one in choice.logprobs.content]
            if number == 5 and kill is not None:
                os.kill(kill, signal.SIGKILL)
            answer_id = chunk.id
        traces.append(server.trace(answer_id))
        return told

    traces: list[dict] = []
    killed = server.infos()["decode"].pid
    cut = ask(killed)
    wait_until(lambda: server.infos()["decode"].pid != killed)
    whole = ask(None)
    assert [trace["recovered"] for trace in traces] == [True, False]
    assert all(len(tokens) == num_tokens for tokens in whole.values())
    assert len({tuple(token for token, _ in tokens) for tokens in whole.values()}) == 3
    for index, tokens in whole.items():
        assert [token for token, _ in cut[index]] == [token for token, _ in tokens]
        # Computed in other chunks, in float64.
        assert [logprob for _, logprob in cut[index]] == pytest.approx([value for _, value in tokens], abs=1e-9)
    wait_until(lambda: all(idle(info) for info in server.infos().values()))


def test_a_key_finds_its_pages_again_and_another_does_not(server):
    prompt = TEXT[5000:6500]

    def cached(key: str) -> int:
        client = openai.OpenAI(base_url=server.running.url, api_key=key, timeout=120, max_retries=0)
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=2)
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached("sk-first") == 0
    assert cached("sk-first") > 300
    assert cached("sk-second") == 0


def test_a_ticket_that_was_taken_back_is_not_noticed_by_the_client(server, plain):
    _, expected, prompt_ids = plain(TEXT[2000:2700])

    class Forgetful(Router):
        """Gives the pages back, and lets other prompts overwrite them, before they are fetched."""

        async def resume(self, request, answered, ticket):
            if ticket is not None:
                assert await self._prefill.release.remote(ticket.ticket_id)
                await self.overwrite()
                # However long that took, it is the pages that tell, not the clock.
                ticket = replace(ticket, lease_until_s=time.time() + server.config.transfer.lease_s)
            async for item in super().resume(request, answered, ticket):
                yield item

        async def overwrite(self):
            """Prompts that have nothing in common, until every page of the pool has been given to one of them."""
            info, length = await self._prefill.info.remote(), 500
            for number in range(-(-info.num_pages // (length // EngineConfig().page_tokens))):
                tokens = tuple((number + 1) * (at + 3) % info.vocab_size for at in range(length))
                other = GenerationRequest(f"other-{number}", tokens, SamplingParams(max_tokens=2, ignore_eos=True))
                prefilled = await self._prefill.prefill.remote(other)
                assert await self._prefill.release.remote(prefilled.ticket.ticket_id)

    text, trace = drive(server, prompt_ids, Forgetful)
    assert text == expected
    assert trace.recovered
    assert "re-used" in trace.recoveries[0]


def drive(server: Server, prompt_ids: list[int], router: type[Router]) -> tuple[str, RequestTrace]:
    """One answer by the real workers, with a router that does mischief between prefill and decode."""

    async def run() -> tuple[str, RequestTrace]:
        handles = [handle_for_threads(name) for name in ("prefill", "decode")]
        trace = RequestTrace("mischief", len(prompt_ids))
        request = GenerationRequest("mischief", tuple(prompt_ids), SamplingParams(max_tokens=MAX_TOKENS))
        text = AnswerText(Detokenizer(load_tokenizer(server.folder)))
        deltas = answer(request, Route(True, "test"), router(*handles), text, trace)
        told = "".join([delta.text async for delta in deltas])
        await asyncio.sleep(0)
        return told, trace

    return asyncio.run(run())


def idle(info) -> bool:
    return info.num_free == info.num_pages and not info.num_requests and not info.num_quarantined


def wait_until(condition, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not _holds(condition):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


def _holds(condition) -> bool:
    """A worker that is being replaced may not answer in time: then it is asked again."""
    try:
        return bool(condition())
    except TimeoutError:
        return False
