"""A load that turns round: every answer is transformers', whoever gave it in which role, nothing is lost or held."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import uvicorn
from tests.unit.serve.loads import worker
from tests.unit.serve.placed import NAMES, GuidedServed

from farspan.config.schema import TransferConfig
from farspan.serve.bench_client import BenchClient, Streamed
from farspan.serve.bench_flip import (
    Asked,
    Driven,
    Flip,
    Pace,
    Watched,
    drive,
    flipping,
    longest_pause_s,
    measure,
    role_rows,
)
from farspan.serve.load import WorkerLoad
from farspan.serve.predict import Predictor
from farspan.serve.quotas import Orders

FLIP = Flip(half_s=4.0, load=0.5, long_prompt=(90, 140), short_prompt=8, long_answer=(60, 100), burst=2)
# Told and not measured: as much is asked whatever the machine does besides.
PACE = Pace(prompt_s=0.2, answer_s=0.3, first_s=60.0, token_s=60.0)
VOCAB = 300


class Told(Predictor):
    """Times that nobody learns: when roles change depends on what arrives, and not on the machine."""

    def learn_prefill(self, kind: str, new_tokens: float, context_tokens: float, seconds: float) -> None:
        pass

    def learn_decode(self, kind: str, running: float, kv_tokens: float, seconds: float) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint(tiny_folder) -> Iterator[GuidedServed]:
    made = GuidedServed(tiny_folder)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def client(endpoint) -> Iterator[BenchClient]:
    """Of the endpoint behind a real socket."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(endpoint.app, log_level="warning", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=asyncio.run, args=(server.serve(sockets=[listening]),))
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        yield BenchClient(url, "tiny", "sk-one", deadline_s=120.0, keep_tokens=True)
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_while_the_load_turns_round_roles_follow_and_every_answer_stays_that_of_transformers(endpoint, client, oracle):
    asked = flipping(FLIP, PACE, VOCAB)

    async def standing() -> list[WorkerLoad]:
        return [await endpoint.workers.report(name, Orders()) for name in NAMES]

    async def driven() -> Driven:
        async with Watched.over(standing) as watched:
            return await drive(client, asked, watched)

    endpoint.renew(replace(endpoint.config, transfer=TransferConfig(split="always")))
    fixed = asyncio.run(driven())
    endpoint.renew(replace(endpoint.config, transfer=TransferConfig()))
    endpoint.ways.guide.times = Told()
    following = asyncio.run(driven())
    asyncio.run(endpoint.settled())
    assert fixed.changes == []
    assert any(at_s >= following.began_s + FLIP.half_s for at_s in following.changes)
    model, _ = oracle
    for wanted, *answers in zip(asked, fixed.answers, following.answers, strict=True):
        ids = torch.tensor([wanted.prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=wanted.new_tokens, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert [found.tokens for found in answers] == [out[0, ids.shape[1] :].tolist()] * 2
    first, second = role_rows(FLIP, PACE, fixed, following)
    assert "wrong" not in second
    assert (first["lost"], second["lost"]) == (0, 0)
    assert first["requests"] == second["requests"] == len(asked)
    # Whatever comes within a minute is in time here.
    assert first["in time, first half"] == second["in time, first half"] == sum(one.at_s < 4.0 for one in asked)
    assert second["role changes"] == len(following.changes)
    assert second["goodput of following / fixed"] == 1.0


def test_a_pace_is_measured_by_bursts_of_whole_answers(client):
    pace = asyncio.run(measure(FLIP, client, VOCAB))
    assert pace.prompt_s > 0
    assert pace.answer_s > pace.token_s / FLIP.patience
    assert pace.first_s == FLIP.patience * pace.prompt_s


def test_nine_of_ten_requests_are_of_one_kind_and_then_of_the_other():
    flip = Flip(half_s=400.0, long_prompt=(20, 40), short_prompt=5)
    asked = flipping(flip, PACE, 2000)
    assert asked == flipping(flip, PACE, 2000)
    halves = [one for one in asked if one.at_s < 400.0], [one for one in asked if one.at_s >= 400.0]
    for half, part, needed_s in zip(halves, (0.9, 0.1), (0.9 * 0.2 + 0.1 * 0.3, 0.1 * 0.2 + 0.9 * 0.3), strict=True):
        long_prompts = sum(len(one.prompt) >= 20 for one in half)
        assert long_prompts / len(half) == pytest.approx(part, abs=0.03)
        assert all(one.new_tokens <= 12 if len(one.prompt) >= 20 else one.new_tokens >= 64 for one in half)
        assert len(half) * needed_s == pytest.approx(2 * flip.load * flip.half_s, rel=0.1)


def test_a_role_changes_when_a_quota_does():
    watched = Watched()
    for at_s, quota in enumerate((None, None, 16, 16, 32)):
        watched.see([worker("a", prefill_tokens=quota), worker("b")], float(at_s))
    assert watched.changes == [2.0, 4.0]


def streamed(asked_s: float, *at_s: float, tokens: tuple[int, ...] = (1, 2, 3, 4, 5, 6)) -> Streamed:
    return Streamed(asked_s, list(at_s), completion_tokens=len(at_s), tokens=list(tokens))


def driven_of(*answers: Streamed | None, changes: tuple[float, ...] = ()) -> Driven:
    asked = [Asked(0.0 if found is None else found.asked_s, (1,) * 10, 2) for found in answers]
    return Driven(asked, 0.0, list(answers), list(changes))


def test_a_pause_is_one_while_somebody_waits_and_counts_as_far_as_it_lies_at_a_change():
    # Nobody waits from 3 to 7.
    driven = driven_of(streamed(0.0, 1.0, 3.0), streamed(7.0, 7.5, 12.5))
    assert longest_pause_s(driven, [(0.0, 20.0)]) == 5.0
    assert longest_pause_s(driven, [(2.0, 8.0)]) == 1.0
    assert longest_pause_s(driven, []) == 0.0


def test_goodput_counts_what_came_in_time_and_a_lost_or_another_answer_is_wrong():
    pace, flip = Pace(0.1, 0.1, first_s=1.0, token_s=0.5), Flip(half_s=5.0)
    fixed = driven_of(streamed(0.0, 1.0, 1.5), streamed(0.0, 1.5, 1.6), streamed(6.0, 6.5, 8.0))
    following = driven_of(streamed(0.0, 1.0, 1.5), streamed(0.0, 0.5, 0.6), streamed(6.0, 6.1, 6.2), changes=(5.5,))
    first, second = role_rows(flip, pace, fixed, following)
    assert (first["goodput_per_s"], second["goodput_per_s"]) == (0.1, 0.3)
    assert second["goodput of following / fixed"] == pytest.approx(3.0)
    assert (second["in time, first half"], second["in time, second half"]) == (2, 1)
    assert first["tokens_per_s"] == 3 * 12 / 8.0
    assert "wrong" not in second
    lost = driven_of(*following.answers[:2], None, changes=(5.5,))
    assert "1 of 3 requests were lost" in role_rows(flip, pace, fixed, lost)[1]["wrong"]
    other = driven_of(streamed(0.0, 1.0, tokens=(9,)), *following.answers[1:], changes=(5.5,))
    assert "1 answers are not those" in role_rows(flip, pace, fixed, other)[1]["wrong"]
    assert "no role ever changed" in role_rows(flip, pace, fixed, driven_of(*following.answers))[1]["wrong"]
    same = [streamed(0.0, 1.0, tokens=(7,))]
    assert "proves nothing" in role_rows(flip, pace, driven_of(*same), driven_of(*same, changes=(5.5,)))[1]["wrong"]
