"""Answers have the form that was asked for, and calls of tools arrive as OpenAI's client knows them."""

from __future__ import annotations

import json
import re
import shutil

import jsonschema
import openai
import pydantic
import pytest
from tests.unit.serve.in_process import Served

from farspan.engine.grammar import GrammarCompiler
from farspan.models.checkpoint import load_tokenizer
from farspan.serve.body import read_body
from farspan.serve.conversation import ChatRequest
from farspan.serve.messages import Tokens
from farspan.serve.questions import chat_question

HERMES = (
    "{% if tools %}Tools: {% for t in tools %}{{ t | tojson }} {% endfor %}as <tool_call>\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
LLAMA3 = HERMES.replace("<tool_call>\n", "ipython parameters\n").replace("<tool_call>", "").replace("</tool_call>", "")
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Köln"]}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 7}},
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "It.", "parameters": PARAMETERS}}
STOP = {"type": "function", "function": {"name": "stop"}}
TEMPLATES = {"hermes": HERMES, "llama3": LLAMA3}
MESSAGES = [{"role": "user", "content": "How is the weather?"}]


@pytest.fixture(scope="module", params=["hermes", "llama3"])
def equipped(request, tiny_folder, tmp_path_factory):
    """(an endpoint whose model knows tools, how it writes calls)."""
    folder = tmp_path_factory.mktemp("tools") / "tiny"
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATES[request.param])
    made = Served(folder)
    yield made, request.param
    made.stop()


class Scripted:
    """Workers whose model says what a test says."""

    def __init__(self, served: Served, text: str) -> None:
        self.served, self.asked, self.cancelled, self.given = served, [], [], {}
        self.tokens = served.api._tokenizer(text)["input_ids"]

    async def prefill(self, request):
        raise AssertionError("short prompts are computed where they are decoded")

    async def resume(self, request, answered, ticket):
        self.asked.append(request)
        for place, token in enumerate(self.tokens):
            self.given[request.request_id] = place + 1
            yield Tokens((token,), "stop" if place == len(self.tokens) - 1 else None)

    async def info(self):
        return await self.served.workers.info()

    def release(self, ticket_id): ...

    def cancel(self, request_id):
        self.cancelled.append(request_id)


def ask(served: Served, *, stream: bool, says: str | None = None, **fields):
    """(message as a dict, finish reason) of a chat, by the official client."""
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 120, "temperature": 1.0, "seed": 3, **fields}

    async def work(client):
        if not stream:
            choice = (await client.chat.completions.create(**body)).choices[0]
            return choice.message.model_dump(exclude_none=True), choice.finish_reason
        content, calls, finish = "", {}, None
        async for chunk in await client.chat.completions.create(**body, stream=True):
            choice = chunk.choices[0]
            content, finish = content + (choice.delta.content or ""), choice.finish_reason or finish
            for delta in choice.delta.tool_calls or []:
                if delta.id is not None:
                    assert delta.index not in calls
                    calls[delta.index] = {"id": delta.id, "type": delta.type}
                    calls[delta.index]["function"] = {"name": delta.function.name, "arguments": ""}
                calls[delta.index]["function"]["arguments"] += delta.function.arguments
        message = {"role": "assistant", **({"content": content} if content or not calls else {})}
        return ({**message, "tool_calls": [calls[i] for i in sorted(calls)]} if calls else message), finish

    if says is None:
        return served.ask(work)
    workers, colocate = served.api._workers, served.config.transfer.colocate_below_tokens
    served.api._workers, served.config.transfer.colocate_below_tokens = Scripted(served, says), 8192
    try:
        return served.ask(work)
    finally:
        served.scripted = served.api._workers
        served.api._workers, served.config.transfer.colocate_below_tokens = workers, colocate


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call_is_one_of_an_offered_tool_with_arguments_of_its_schema(equipped, stream):
    served, _ = equipped
    message, finish = ask(served, stream=stream, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    (call,) = message["tool_calls"]
    assert "content" not in message
    assert (call["function"]["name"], finish) == ("get_weather", "tool_calls")
    jsonschema.validate(json.loads(call["function"]["arguments"]), PARAMETERS)
    assert re.fullmatch("call_[0-9a-f]{24}", call["id"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_tool_is_called_once_and_no_other(equipped, stream):
    served, _ = equipped
    for name in ("stop", "get_weather"):
        choice = {"type": "function", "function": {"name": name}}
        message, finish = ask(served, stream=stream, tools=[WEATHER, STOP], tool_choice=choice)
        assert [call["function"]["name"] for call in message["tool_calls"]] == [name]
        assert isinstance(json.loads(message["tool_calls"][0]["function"]["arguments"]), dict)
        assert finish == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_the_model_decides_on_is_told_as_a_call_and_words_as_words(equipped, stream):
    served, written = equipped
    inside = {"hermes": "arguments", "llama3": "parameters"}[written]
    call = f'{{"name": "get_weather", "{inside}": {{"city": "Köln", "days": 3}}}}'
    says = f"Let me look.\n<tool_call>\n{call}\n</tool_call>" if written == "hermes" else call
    message, finish = ask(served, stream=stream, says=says, tools=[WEATHER])
    assert message.get("content") == ("Let me look." if written == "hermes" else None)
    assert message["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Köln", "days": 3}'}
    assert finish == "tool_calls"
    assert served.scripted.asked[0].params.grammar is None
    message, finish = ask(served, stream=stream, says="It rains <tool_c", tools=[WEATHER])
    assert (message, finish) == ({"role": "assistant", "content": "It rains <tool_c"}, "stop")
    # Without tools nothing is looked for.
    message, finish = ask(served, stream=stream, says=says)
    assert (message, finish) == ({"role": "assistant", "content": says}, "stop")


@pytest.mark.parametrize(("stream", "n"), [(False, 1), (True, 1), (False, 3)])
def test_without_parallel_calls_an_answer_ends_after_its_first_whole_call(equipped, stream, n):
    served, written = equipped
    inside = {"hermes": "arguments", "llama3": "parameters"}[written]
    calls = [
        f'{{"name": "{name}", "{inside}": {{"a": {place}}}}}' for place, name in enumerate(("stop", "get_weather"))
    ]
    tagged = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    says = "\n".join(["Well.", *tagged, "No more."]) if written == "hermes" else "; ".join(calls)
    fields = {"tools": [WEATHER, STOP], "n": n}
    message, finish = ask(served, stream=stream, says=says, parallel_tool_calls=False, **fields)
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "stop", "arguments": '{"a": 0}'}]
    assert (message.get("content"), finish) == ("Well." if written == "hermes" else None, "tool_calls")
    # The workers stop: what comes after the call is never computed.
    assert len(served.scripted.cancelled) == n
    assert all(given < len(served.scripted.tokens) for given in served.scripted.given.values())
    if n == 1:
        message, _ = ask(served, stream=stream, says=says, **fields)
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["stop", "get_weather"]
        assert served.scripted.cancelled == []


def test_the_template_is_given_tools_calls_and_their_results(equipped):
    served, written = equipped
    called = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Köln"}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    ask(served, stream=False, says="x", messages=messages, tools=[WEATHER])
    prompt = served.api._tokenizer.decode(served.scripted.asked[0].prompt)
    assert '"description": "It."' in prompt
    assert '"arguments": {"city": "K\\u00f6ln"}' in prompt or '"arguments": {"city": "Köln"}' in prompt
    assert ("<tool_call>" in prompt) == (written == "hermes")
    assert prompt.endswith("tool: rainassistant:")
    ask(served, stream=False, says="x", tools=[WEATHER], tool_choice="none")
    assert "get_weather" not in served.api._tokenizer.decode(served.scripted.asked[0].prompt)


@pytest.mark.parametrize("stream", [False, True])
def test_a_form_and_tools_together_allow_either_and_nothing_else_or_are_refused(equipped, stream):
    served, written = equipped
    if written == "llama3":
        fields = {"tools": [STOP], "response_format": {"type": "json_object"}}
        refused = served.post("/v1/chat/completions", {"model": "tiny", "messages": MESSAGES, **fields})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "structured_outputs")
        return
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    message, finish = ask(served, stream=stream, tools=[STOP], response_format=form, parallel_tool_calls=False)
    if finish == "tool_calls":
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["stop"]
    else:
        jsonschema.validate(json.loads(message["content"]), schema)
    tokenizer = served.api._tokenizer
    compiler = GrammarCompiler(tokenizer, len(tokenizer), frozenset([tokenizer.eos_token_id]))
    call = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    texts = {
        call: True,
        '{"a":true}': True,
        "words": False,
        '{"a":1}': False,
    }
    for text, fine in texts.items():
        matcher = compiler.start("r", served.workers.asked[-1].params.grammar)
        tokens = tokenizer(text)["input_ids"]
        assert (matcher.fits(tokens) == len(tokens)) == fine, text


FORMS = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": PARAMETERS}}},
    {"extra_body": {"structured_outputs": {"json": PARAMETERS}}},
    {"extra_body": {"guided_json": json.dumps(PARAMETERS)}},
    {"extra_body": {"structured_outputs": {"regex": "[a-c]{3}-[0-9]{2}"}}},
    {"extra_body": {"guided_regex": "[a-c]{3}-[0-9]{2}"}},
    {"extra_body": {"structured_outputs": {"choice": ["yes.", "no \"really\" \\ no"]}}},
    {"extra_body": {"guided_choice": ["yes.", "no \"really\" \\ no"]}},
    {"extra_body": {"structured_outputs": {"grammar": 'start: "a" ("-" DIGIT)+ "!"\nDIGIT: /[0-9]/'}}},
    {"extra_body": {"guided_grammar": 'start: "a" ("-" DIGIT)+ "!"\nDIGIT: /[0-9]/'}},
]  # fmt: skip


def fits(asked: dict, text: str) -> bool:
    told = json.dumps(asked)
    if "regex" in told:
        return re.fullmatch("[a-c]{3}-[0-9]{2}", text) is not None
    if "choice" in told:
        return text in ("yes.", 'no "really" \\ no')
    if "grammar" in told:
        return re.fullmatch("a(-[0-9])+!", text) is not None
    jsonschema.validate(json.loads(text), PARAMETERS)
    return True


@pytest.mark.parametrize("asked", FORMS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("die_after", [None, 3])
def test_an_answer_has_the_form_by_every_name_it_is_asked_by_also_after_a_death(served, asked, stream, die_after):
    served.workers.die_after = die_after
    message, finish = ask(served, stream=stream, **asked)
    assert fits(asked, message["content"]), message
    assert finish == "stop"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools.0.function.name"),
        ({"tools": [WEATHER], "tool_choice": "required", "guided_regex": "a"}, "tool_choice"),
        ({"tools": [WEATHER], "guided_regex": "a"}, "structured_outputs"),
        ({"guided_regex": "a", "guided_json": {}}, "structured_outputs"),
        ({"guided_regex": "(unclosed"}, None),
        ({"guided_grammar": "start: nothing_like_it"}, None),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "what"}}}}, None),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "get_weather"}, "tool_choice"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
            "tools.0.function.parameters",
        ),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"min_tokens": 9, "max_tokens": 2}, "min_tokens"),
        ({"stop": ""}, "stop.0"),
    ],
)
def test_what_cannot_be_forced_or_combined_is_refused_by_name(equipped, fields, param):
    served, _ = equipped
    answer = served.post("/v1/chat/completions", {"model": "tiny", "messages": MESSAGES, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert len(error["message"]) < 700


STRICT, LOOSE = ({**WEATHER, "function": {**WEATHER["function"], "strict": strict}} for strict in (True, False))
GOES = {"type": "function", "function": {"name": "go"}}


def written_as(written: str, *calls: tuple[str, str]) -> str:
    inside = {"hermes": "arguments", "llama3": "parameters"}[written]
    told = [f'{{"name": "{name}", "{inside}": {arguments}}}' for name, arguments in calls]
    return "; ".join(told) if written == "llama3" else "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in told)


@pytest.mark.parametrize("special", [False, True])
def test_a_strict_tool_holds_calls_the_model_decides_on_to_its_schema_and_words_to_nothing(equipped, special):
    served, written = equipped
    tokenizer = load_tokenizer(served.folder)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>", "<think>"]})
    compiler = GrammarCompiler(tokenizer, len(tokenizer), frozenset([tokenizer.eos_token_id]))
    asked = {"model": "m", "messages": MESSAGES, "tools": [STRICT, GOES]}
    read, ignored = read_body(json.dumps(asked).encode(), ChatRequest)
    assert ignored == ()
    grammar = chat_question(tokenizer, read, "auto").grammar
    good, bad = '{"city":"Paris","days":3}', '{"city":"Paris","days":8}'
    before = "Let me look. " if written == "hermes" else ""
    fine = {
        "": True,
        "It rains {": True,
        " \n": True,
        before + written_as(written, ("get_weather", good)): True,
        before + written_as(written, ("go", '{"anything": [1, 2]}'), ("get_weather", good)): True,
        before + written_as(written, ("get_weather", bad)): False,
        before + written_as(written, ("go", "{}"), ("get_weather", bad)): False,
        before + written_as(written, ("other", "{}")): False,
        "<think>Well.<think> " + written_as(written, ("get_weather", good)): True,
        "<think>Well.<think> " + written_as(written, ("get_weather", bad)): written == "llama3",
        # Where it is text, it is the words that a bare call would have to begin.
        "<think>" + written_as(written, ("get_weather", bad)): written == "llama3" and not special,
    }
    for text, fits in fine.items():
        matcher = compiler.start("r", grammar)
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert (matcher.fits(tokens) == len(tokens)) == fits, text
        if fits:
            matcher.replay(tokens)
            assert matcher.complete, text
    loose, _ = read_body(json.dumps({**asked, "tools": [LOOSE, GOES]}).encode(), ChatRequest)
    assert chat_question(tokenizer, loose, "auto").grammar is None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_schema_no_call_can_be_held_to_is_refused_with_its_tool(equipped, choice, stream):
    served, _ = equipped
    unheld = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tool = {"type": "function", "function": {"name": "gather", "parameters": unheld, "strict": True}}
    body = {"model": "tiny", "messages": MESSAGES, "tools": [STOP, STRICT, tool], "tool_choice": choice}
    answer = served.post("/v1/chat/completions", {**body, "stream": stream})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "tools")
    assert error["message"].startswith("tools: no call of gather can be held to its parameters (Unimplemented keys")
    assert "arguments_" not in error["message"]
    tool = {**tool, "function": {**tool["function"], "strict": False}}
    asked = served.post("/v1/chat/completions", {**body, "tools": [tool], "tool_choice": "auto", "max_tokens": 1})
    assert asked.status_code == 200


def test_tags_that_are_special_tokens_may_be_what_a_forced_call_is_written_with(equipped):
    served, written = equipped
    tokenizer = load_tokenizer(served.folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    compiler = GrammarCompiler(tokenizer, len(tokenizer), frozenset([tokenizer.eos_token_id]))
    asked = {"model": "m", "messages": MESSAGES, "tools": [STOP], "tool_choice": "required"}
    read, _ = read_body(json.dumps(asked).encode(), ChatRequest)
    matcher = compiler.start("r", chat_question(tokenizer, read, "auto").grammar)
    tokens = tokenizer(written_as(written, ("stop", "{}")))["input_ids"]
    assert matcher.fits(tokens) == len(tokens)


def test_the_template_is_not_told_that_a_tool_is_strict(equipped):
    served, _ = equipped
    told = [served.post("/tokenize", {"messages": MESSAGES, "tools": [one, GOES]}).json() for one in (STRICT, WEATHER)]
    assert told[0]["tokens"] == told[1]["tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_only_tools_that_are_allowed_are_offered_and_called(equipped, stream):
    served, _ = equipped
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "stop"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    served.workers.asked.clear()
    message, finish = ask(served, stream=stream, tools=[WEATHER, STOP], tool_choice=choice, parallel_tool_calls=False)
    assert ([call["function"]["name"] for call in message["tool_calls"]], finish) == (["stop"], "tool_calls")
    prompt = served.api._tokenizer.decode(served.workers.asked[0].prompt)
    assert "stop" in prompt
    assert "get_weather" not in prompt
    says = "Words."
    choice = {"type": "allowed_tools", "allowed_tools": {**allowed, "mode": "auto"}}
    message, finish = ask(served, stream=stream, says=says, tools=[WEATHER, STOP], tool_choice=choice)
    assert (message["content"], finish, served.scripted.asked[0].params.grammar) == (says, "stop", None)


@pytest.mark.parametrize("parameters", [{}, {"type": ["object", "null"]}, {"$ref": "#/$defs/a", "$defs": {"a": {}}}])
def test_arguments_are_an_object_also_where_the_schema_allows_anything(equipped, parameters):
    served, written = equipped
    tokenizer = served.api._tokenizer
    compiler = GrammarCompiler(tokenizer, len(tokenizer), frozenset([tokenizer.eos_token_id]))
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    asked = {"model": "m", "messages": MESSAGES, "tools": [tool], "tool_choice": "required"}
    read, _ = read_body(json.dumps(asked).encode(), ChatRequest)
    for arguments, fits in (('{"a":[1]}', True), ("{}", True), ('"a"', False), ("[1]", False), ("null", False)):
        tokens = tokenizer(written_as(written, ("f", arguments)))["input_ids"]
        matcher = compiler.start("r", chat_question(tokenizer, read, "auto").grammar)
        assert (matcher.fits(tokens) == len(tokens)) == fits, arguments


class Answer(pydantic.BaseModel):
    sunny: bool


def test_the_clients_own_objects_sent_back_are_taken_as_they_are(equipped):
    served, _ = equipped
    tool = openai.pydantic_function_tool(Answer)
    before = [{"role": "developer", "content": "Be brief."}, *MESSAGES]
    body = {"model": "tiny", "tools": [tool], "temperature": 0}

    async def loop(client: openai.AsyncOpenAI) -> list[str | None]:
        more = {"max_tokens": 120, "tool_choice": "required", "parallel_tool_calls": False}
        said = (await client.chat.completions.parse(messages=before, **body, **more)).choices[0].message
        assert isinstance(said.tool_calls[0].function.parsed_arguments, Answer)
        result = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "Done."}
        told = []
        for back in (said, said.model_dump(), said.model_dump(exclude_none=True)):
            asked = client.chat.completions.with_raw_response
            answer = await asked.create(messages=[*before, back, result], max_tokens=2, **body)
            told.append(answer.headers.get("x-farspan-ignored"))
        return told

    assert served.ask(loop) == ["messages.2.tool_calls.0.function.parsed_arguments"] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_special_tokens_are_in_the_text_where_it_is_asked_for_and_can_stop_it(served, stream):
    says = "one<|end|>two"
    more = {"stream": stream, "says": says, "max_tokens": 50}
    assert ask(served, **more)[0]["content"] == "onetwo"
    shown = {"skip_special_tokens": False}
    # The one that ends answers is no part of them, but where it does not end them.
    assert ask(served, **more, extra_body=shown)[0]["content"] == "onetwo"
    assert ask(served, **more, extra_body={**shown, "ignore_eos": True})[0]["content"] == says
    stopped = {**shown, "ignore_eos": True, "stop": ["<|end|>"]}
    message, finish = ask(served, **more, extra_body=stopped)
    assert (message["content"], finish) == ("one", "stop")
    # Or where what ends an answer is asked for, by whatever it ends.
    ended = {"include_stop_str_in_output": True}
    assert ask(served, **more, extra_body={**shown, **ended})[0]["content"] == says
    assert ask(served, **more, extra_body={**stopped, **ended})[0]["content"] == "one<|end|>"
    assert ask(served, **more, extra_body=ended)[0]["content"] == "onetwo"
    # The engine, whose text has no special tokens, does not look for it.
    assert served.scripted.asked[0].params.stop == ()
    ask(served, **more, stop=["<|end|>"])
    assert served.scripted.asked[0].params.stop == ("<|end|>",)


def test_a_template_without_tools_refuses_them(served):
    answer = served.post("/v1/chat/completions", {"model": "tiny", "messages": MESSAGES, "tools": [WEATHER]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")


NO_SCHEMAS = ["{", "true", "[1]", '"text"', "NaN", "", "[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000]


@pytest.mark.parametrize("text", NO_SCHEMAS)
@pytest.mark.parametrize("offered", [True, False])
def test_a_schema_that_is_no_object_is_refused_by_the_name_it_was_given_by(equipped, text, offered):
    served, _ = equipped
    tools = {"tools": [STOP]} if offered else {}
    for fields, param in (
        ({"guided_json": text}, "guided_json"),
        ({"structured_outputs": {"json": text}}, "structured_outputs.json"),
    ):
        answer = served.post("/v1/chat/completions", {"model": "tiny", "messages": MESSAGES, **tools, **fields})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param
        assert len(answer.json()["error"]["message"]) < 300
