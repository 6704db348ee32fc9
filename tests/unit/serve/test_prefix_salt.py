"""Nobody finds out by the clock, or by counted tokens, what another API key has asked."""

from __future__ import annotations

import logging

import pytest
from tests.unit.serve.in_process import Served
from tests.unit.serve.tiny_folder import TEXT

from farspan.config.schema import TransferConfig
from farspan.serve.messages import ANYBODY

PROMPT = TEXT[:800]


def cached(served: Served, key: str, **more: object) -> int:
    """Tokens of the prompt that were found computed."""
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 2, "temperature": 0, "ignore_eos": True, **more}
    answer = served.post("/v1/completions", body, key)
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    assert usage["completion_tokens"] == 2
    return usage["prompt_tokens_details"]["cached_tokens"]


@pytest.fixture
def fresh(tiny_folder, request):
    made = Served(tiny_folder, **request.param)
    yield made
    made.stop()


@pytest.mark.parametrize("fresh", [{}, {"transfer": TransferConfig(colocate_below_tokens=8192)}], indirect=True)
def test_a_key_finds_its_own_pages_and_never_those_of_another(fresh):
    assert cached(fresh, "sk-one") == 0
    again = cached(fresh, "sk-one")
    assert again > 200
    assert cached(fresh, "sk-two") == 0
    assert cached(fresh, "sk-two") == again


@pytest.mark.parametrize("fresh", [{"share_prefixes": True}], indirect=True)
def test_keys_share_pages_only_where_the_config_says_so(fresh):
    assert cached(fresh, "sk-one") == 0
    assert cached(fresh, "sk-two") > 200
    # A salt of its own is shared with whoever knows it.
    assert cached(fresh, "sk-one", cache_salt="a") == 0
    assert cached(fresh, "sk-two", cache_salt="a") > 200
    assert cached(fresh, "sk-two", cache_salt="b") == 0


@pytest.mark.parametrize("fresh", [{}], indirect=True)
def test_a_cache_salt_divides_what_one_key_finds(fresh):
    assert cached(fresh, "sk-one", cache_salt="a") == 0
    assert cached(fresh, "sk-one", cache_salt="b") == 0
    assert cached(fresh, "sk-one") == 0
    assert cached(fresh, "sk-one", cache_salt="a") > 200
    # Knowing another's salt is not enough: its key belongs to it.
    assert cached(fresh, "sk-two", cache_salt="a") == 0


@pytest.mark.parametrize("fresh", [{}], indirect=True)
def test_what_travels_or_is_logged_names_a_caller_and_holds_no_key(fresh, caplog):
    with caplog.at_level(logging.DEBUG):
        cached(fresh, "sk-one", cache_salt="secret words")
        assert fresh.post("/v1/completions", {"model": "tiny"}, "sk-one").status_code == 400
        assert fresh.post("/v1/completions", {"model": "tiny"}, "sk-stranger").status_code == 401
    assert len(fresh.workers.asked) == 2
    assert all(request.caller != ANYBODY for request in fresh.workers.asked)
    (prefilled,) = fresh.workers.prefilled
    assert prefilled.ticket is not None
    told = [*map(repr, fresh.workers.asked), repr(prefilled), caplog.text, fresh.get("/metrics").text]
    for secret in ("sk-one", "sk-stranger", "secret words", fresh.api._keys[0].digest):
        assert not any(secret in text for text in told)
    # Nor does a ticket say whose pages it is for: that stays with the request.
    assert fresh.workers.asked[0].caller.salt not in repr(prefilled)
