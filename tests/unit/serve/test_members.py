"""What the parts of a conversation say is served, told as passed over, or refused by name."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import openai.types.chat as chat_types
import pytest
from tests.unit.serve.in_process import Served


def asked(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [*messages, {"role": "user", "content": "x"}], "max_tokens": 1, **more}


def prompt_of(served: Served, *messages: dict[str, Any]) -> str:
    """What a model is shown of them."""
    tokens = served.post("/tokenize", {"model": "tiny", "messages": list(messages)}).json()["tokens"]
    text: str = served.post("/detokenize", {"model": "tiny", "tokens": tokens}).json()["prompt"]
    return text


def test_a_developers_message_is_shown_to_the_model_as_the_systems(served):
    shown = [prompt_of(served, {"role": role, "content": "Be brief."}) for role in ("system", "developer")]
    assert shown == ["system: Be brief.\nassistant:"] * 2


def test_every_role_of_openais_client_is_served_but_the_one_of_legacy_functions(served):
    for kind in get_args(chat_types.ChatCompletionMessageParam):
        (role,) = get_args(get_type_hints(kind)["role"])
        told = served.post("/v1/chat/completions", asked({"role": role, "content": "x"}))
        assert told.status_code == (400 if role == "function" else 200), told.text


@pytest.mark.parametrize("role", ["admin", "System", "", "function", "ipython"])
@pytest.mark.parametrize("url", ["/v1/chat/completions", "/tokenize"])
def test_a_role_nobody_has_is_refused_by_name_with_those_there_are(served, url, role):
    told = served.post(url, asked({"role": role, "content": "x"}))
    assert told.status_code == 400, told.text
    error = told.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "messages.0.role")
    assert f"got {role!r}" in error["message"]
    assert all(repr(known) in error["message"] for known in ("system", "developer", "user", "assistant", "tool"))
