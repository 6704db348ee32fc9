"""Whatever comes in, what goes out is one clear sentence with a status that says whose fault it is."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farspan.serve.conversation import ChatRequest
from farspan.serve.unserved import NEUTRAL
from farspan.serve.wire import CompletionRequest

URLS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
TEXT = {"model": "tiny", "prompt": "x", "max_tokens": 1}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}


def refused(answer, *statuses: int) -> dict:
    assert answer.status_code in statuses, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) < 800
    assert "\n" not in error["message"]
    for leaked in ("Traceback", "pydantic", "/serve/farspan", "site-packages", "sk-one", "<object", "0x7"):
        assert leaked not in answer.text
    return error


NESTED = b'{"model": "tiny", "prompt": "x", "messages": ' + b'[{"a":' * 3000 + b"1" + b"}]" * 3000 + b"}"


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"7", b'"text"', b"\xff\xfe{", b'{"model": "\xc3\x28"}', b"[" * 100_000, NESTED,
     b'{"model": 1}', b'{"model": {"a": []}}', b'{"prompt": NaN}', b'{"seed": ' + b"9" * 6000 + b"}", b"{}" * 2,
     b'{"model": "tiny", "prompt": {"x": 1}, "messages": {"x": 1}, "tokens": {"x": 1}}',
     b'{"model": "tiny", "prompt": "\\ud800", "messages": [], "tokens": ["\\udfff"]}'],
)  # fmt: skip
def test_a_body_that_is_no_request_is_refused(served, url, content):
    refused(served.post(url, content), 400)
    assert served.workers.asked == []


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_larger_than_allowed_is_refused_before_it_is_read_to_its_end(served, declared, monkeypatch):
    monkeypatch.setattr(served.config, "max_body_bytes", 10_000)
    sent = []

    async def pieces():
        for _ in range(1000):
            sent.append(1)
            yield b"x" * 1000

    if declared:
        answer = served.post("/v1/completions", b"x", headers={"content-length": "10001"})
    else:

        async def run():
            async with served.http() as http:
                return await http.post("/v1/completions", content=pieces())

        answer = asyncio.run(run())
        assert len(sent) < 20
    refused(answer, 413)


@pytest.mark.parametrize("length", ["-1", "x", "9" * 40, "1e3"])
def test_a_length_that_is_no_length_is_refused(served, length):
    refused(served.post("/v1/completions", b"{}", headers={"content-length": length}), 400, 413)


FIELDS = [
    ("n", 10**12), ("n", [1]), ("max_tokens", -1), ("max_tokens", "many"), ("temperature", {}), ("top_p", "x"),
    ("stop", [["a"]]), ("stop", {"a": 1}), ("stop", [""]), ("stop_token_ids", ["a"]), ("logit_bias", [1]),
    ("logit_bias", {"999999": 1}), ("logit_bias", {"-1": 1}), ("seed", "x"), ("stream", 1), ("top_k", 1.5),
    ("response_format", "json"), ("response_format", {"type": 1}), ("structured_outputs", {"regex": 1}),
    ("guided_regex", "("), ("guided_regex", "a" * 300_000), ("guided_json", "{"), ("guided_grammar", "start: ???"),
    ("guided_json", {"$ref": "#/nowhere"}), ("min_tokens", 10**9), ("priority", 10**9), ("deadline_s", -1),
    ("stream_options", {"include_usage": "yes"}), ("cache_salt", 5),
]  # fmt: skip


@pytest.mark.parametrize(("url", "good"), [("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)])
@pytest.mark.parametrize(("field", "value"), FIELDS)
def test_a_field_of_a_wrong_type_or_size_is_refused_by_its_name(served, url, good, field, value):
    error = refused(served.post(url, {**good, field: value}), 400)
    names = {"guided_regex": "regex", "guided_json": "json", "guided_grammar": "lark"}
    assert names.get(field, field) in error["message"]


@pytest.mark.parametrize(
    "messages",
    [[], "x", [1], [{"role": "user"}], [{"role": 1, "content": "x"}], [{"content": "x"}],
     [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
     [{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}]],
)  # fmt: skip
def test_messages_that_are_none_are_refused_by_name(served, messages):
    if messages == [{"role": "user"}]:
        # No words at all are allowed: assistants that only called tools wrote none.
        assert served.post("/v1/chat/completions", {**CHAT, "messages": messages}).status_code == 200
        return
    assert str(refused(served.post("/v1/chat/completions", {**CHAT, "messages": messages}), 400)["param"]).startswith(
        "messages"
    )


@pytest.mark.parametrize("prompt", [[], [5, 10**9], [-1], [[]], [[1], []], [10**30]])
def test_prompts_that_hold_no_token_of_the_model_are_refused(served, prompt):
    answer = served.post("/v1/completions", {**TEXT, "prompt": prompt, "echo": True, "logprobs": 1})
    assert refused(answer, 400)["param"] == "prompt"
    refused(served.post("/detokenize", {"tokens": [10**9]}), 400)


@pytest.mark.parametrize("key", ["", "sk-three", "sk-one\u00e9", "sk-one sk-two", "x" * 10_000])
@pytest.mark.parametrize("url", [*URLS, "/metrics", "/v1/models", "/v1/models/tiny", "/v1/requests/x/trace"])
def test_nobody_without_a_key_learns_anything(served, key, url):
    header = {"authorization": f"Bearer {key}".encode("latin-1")}
    answer = served.post(url, b"{}", headers=header) if url in URLS else served.get(url, key)
    refused(answer, 401)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("url", "shape"), [("/v1/completions", CompletionRequest), ("/v1/chat/completions", ChatRequest)]
)
@given(data=st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_value_of_any_field_is_our_fault(served, url, shape, data):
    names = data.draw(st.lists(st.sampled_from(sorted({*shape.model_fields, *NEUTRAL, "x"})), max_size=4))
    fields = {name: data.draw(JSON) for name in names if name not in ("max_tokens", "max_completion_tokens", "n")}
    answer = served.post(url, {**(TEXT if url == "/v1/completions" else CHAT), **fields})
    if answer.status_code != 200:
        refused(answer, 400, 404)


def test_one_keys_trace_is_not_anothers(served):
    answer = served.post("/v1/completions", TEXT, headers={"x-request-id": "mine"})
    assert answer.json()["id"] == "cmpl-mine"
    assert served.get("/v1/requests/mine/trace").json()["output_tokens"] == 1
    refused(served.get("/v1/requests/mine/trace", "sk-two"), 404)
    served.post(
        "/v1/completions", {**TEXT, "max_tokens": 2, "ignore_eos": True}, "sk-two", headers={"x-request-id": "mine"}
    )
    assert served.get("/v1/requests/mine/trace").json()["output_tokens"] == 1


def test_tokens_and_text_go_to_each_other_as_the_tokenizer_does(served, oracle):
    _, tokenizer = oracle
    for text in ("def f(x):\n  return", "Köln \U0001f600", " "):
        told = served.post("/tokenize", {"model": "tiny", "prompt": text, "return_token_strs": True}).json()
        assert told["tokens"] == tokenizer(text)["input_ids"]
        assert (told["count"], len(told["token_strs"])) == (len(told["tokens"]), len(told["tokens"]))
        assert served.post("/detokenize", {"tokens": told["tokens"]}).json() == {"prompt": text}
    chat = served.post("/tokenize", {"messages": CHAT["messages"]}).json()
    usage = served.post("/v1/chat/completions", CHAT).json()["usage"]
    assert chat["count"] == usage["prompt_tokens"]
    assert tokenizer.decode(chat["tokens"]) == "user: x\nassistant:"


def test_what_was_counted_is_what_was_answered(served):
    before = numbers(served)
    assert served.post("/v1/completions", {**TEXT, "max_tokens": 5, "ignore_eos": True, "n": 2}).status_code == 200
    served.post("/v1/completions", {**TEXT, "guided_regex": "("})
    after = numbers(served)
    gained = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    assert gained['farspan_requests_total{outcome="answered"}'] == 1
    assert gained['farspan_requests_total{outcome="refused"}'] == 1
    assert gained['farspan_request_tokens_total{kind="answer"}'] == 10
    assert gained["farspan_time_to_first_token_seconds_count"] == 1
    # Two answers of five tokens.
    assert gained["farspan_inter_token_seconds_count"] == gained['farspan_inter_token_seconds_bucket{le="+Inf"}'] == 8
    assert after["farspan_requests_running"] == 0
    assert after['farspan_kv_pages{role="decode",state="free"}'] == after['farspan_kv_pages{role="decode",state="all"}']


def numbers(served) -> dict[str, float]:
    lines = served.get("/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_the_endpoint_says_that_it_lives_and_is_ready_without_a_key(served):
    assert served.get("/health", "none").json() == {"status": "ok"}
    ready = served.get("/ready", "none").json()
    assert (ready["status"], ready["roles"][0]) == ("ready", "prefill")
    assert json.loads(served.get("/v1/models").text)["data"][0]["id"] == "tiny"
