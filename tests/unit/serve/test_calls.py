"""Calls of tools are read the same however the text is cut, and what is no call is told as words."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan.serve.calls import whole_calls
from farspan.serve.json_calls import BareReader, TaggedReader

NAMES = frozenset({"get_weather", "put"})


def read(reader, text: str, cuts: list[int]):
    """(words, calls as (name, arguments), pieces)."""
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    said = [reader.push(text[a:b]) for a, b in pairwise(places)]
    said.append(reader.finish())
    calls = whole_calls(call for one in said for call in one.calls)
    ids = [call["id"] for call in calls]
    assert len(set(ids)) == len(ids)
    told = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    return "".join(one.text for one in said), told, [call for one in said for call in one.calls]


CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln {\\"}", "days": [1, {"a": 2}]}}\n</tool_call>'
ARGUMENTS = '{"city": "Köln {\\"}", "days": [1, {"a": 2}]}'
TAGGED = [
    ("Just words <tool_cal and {braces}.\n", "Just words <tool_cal and {braces}.\n", []),
    (CALL, "", [("get_weather", ARGUMENTS)]),
    (f"Let me see.\n\n{CALL}\n", "Let me see.", [("get_weather", ARGUMENTS)]),
    (f"{CALL}\n{CALL}", "", [("get_weather", ARGUMENTS)] * 2),
    # The arguments first: read at the end.
    ('<tool_call>{"arguments": {"a": 1}, "name": "put"}</tool_call>', "", [("put", '{"a": 1}')]),
    # Arguments as text, as OpenAI writes them.
    ('<tool_call>{"name": "put", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("put", '{"a": 1}')]),
    ('<tool_call>{"name": "put"}</tool_call>', "", [("put", "{}")]),
    ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', None, []),
    ("<tool_call>\nno JSON</tool_call> then", None, []),
    (
        '<tool_call>{"name": "put", "arguments": {"a": "</tool_call>"}}</tool_call>',
        "",
        [("put", '{"a": "</tool_call>"}')],
    ),
    # Cut by max_tokens.
    ('<tool_call>\n{"name": "put", "arguments": {"a": "lon', "", [("put", '{"a": "lon')]),
    ('<tool_call>\n{"na', None, []),
    ('<tool_call>{"name": "put", "arguments": {"a": 1}, "id": {"b": 2}}</tool_call>!', "!", [("put", '{"a": 1}')]),
]
BARE = [
    ("Words {not a call}", None, []),
    ('{"name": "put", "parameters": {"a": {"b": "}"}}}', "", [("put", '{"a": {"b": "}"}}')]),
    (' {"type": "function", "name": "put", "parameters": {}}\n', "", [("put", "{}")]),
    ('{"name": "put", "parameters": {"a": 1}}; {"name": "get_weather", "parameters": {}}', "",
     [("put", '{"a": 1}'), ("get_weather", "{}")]),
    ('{"parameters": {"a": 1}, "name": "put"}', "", [("put", '{"a": 1}')]),
    ('{"name": "Bob", "parameters": {"a": 1}}', None, []),
    ('{"an": "answer"}', None, []),
    ('{"name": "put", "parameters": {"a": "lon', "", [("put", '{"a": "lon')]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words", "calls"), TAGGED)
@given(cuts=st.lists(st.integers(0, 150), max_size=12))
@settings(max_examples=40, deadline=None)
def test_tagged_calls_are_the_same_wherever_the_text_is_cut(text, words, calls, cuts):
    found, told, _ = read(TaggedReader(NAMES), text, cuts)
    assert (found, told) == (text if words is None else words, calls)


@pytest.mark.parametrize(("text", "words", "calls"), BARE)
@given(cuts=st.lists(st.integers(0, 150), max_size=12))
@settings(max_examples=40, deadline=None)
def test_bare_calls_are_the_same_wherever_the_text_is_cut(text, words, calls, cuts):
    found, told, _ = read(BareReader(NAMES), text, cuts)
    assert (found, told) == (text if words is None else words, calls)


@given(cuts=st.lists(st.integers(0, 250), max_size=12))
@settings(max_examples=60, deadline=None)
def test_a_reader_of_one_call_is_over_with_it_wherever_the_text_is_cut(cuts):
    bare = '{"name": "put", "parameters": {"a": 1}}'
    for reader, text, words in (
        (
            TaggedReader(NAMES, several=False),
            f"Hm.<tool_call>no</tool_call> {CALL}\n{CALL} and",
            "Hm.<tool_call>no</tool_call>",
        ),
        (BareReader(NAMES, several=False), f"{bare}; {bare} and", ""),
    ):
        found, told, _ = read(reader, text, cuts)
        assert (found, len(told), reader.over) == (words, 1, True)
    for reader in (TaggedReader(NAMES, several=False), BareReader(NAMES, several=False)):
        assert read(reader, "Only words <tool.", cuts)[:2] == ("Only words <tool.", [])
        assert not reader.over


@settings(max_examples=50, deadline=None)
@given(
    arguments=st.dictionaries(
        st.text(max_size=8), st.recursive(st.text(max_size=9) | st.integers(), st.lists), max_size=4
    ),
    cuts=st.lists(st.integers(0, 200), max_size=20),
    spaces=st.sampled_from([None, 2]),
)
def test_any_arguments_come_back_as_they_were_written(arguments, cuts, spaces):
    written = json.dumps(arguments, indent=spaces)
    for reader, text in (
        (TaggedReader(NAMES), f'<tool_call>{{"name": "put", "arguments": {written}}}</tool_call>'),
        (BareReader(NAMES), f'{{"name": "put", "parameters": {written}}}'),
    ):
        assert read(reader, text, cuts)[:2] == ("", [("put", written)])


def test_arguments_are_told_while_they_come():
    pieces = read(TaggedReader(NAMES), CALL, list(range(len(CALL))))[2]
    assert (pieces[0].name, pieces[0].arguments) == ("get_weather", "{")
    assert len(pieces) > 30
    assert all(piece.id is None for piece in pieces[1:])
    assert "".join(piece.arguments for piece in pieces) == ARGUMENTS
