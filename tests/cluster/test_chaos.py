"""Whatever happens to whichever process, and whenever: every request gets exactly its tokens, each once.

What is asked of a client. Of workers, the agent of the host and Serve's controller it notices nothing: its one stream
goes on. The proxy and the ingress hold its connection: when one of them is lost, the stream breaks off without
`[DONE]`, or says nothing for 10 s, and the client asks again, with the same seed; what it was told before is the
beginning of what it is told then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path

import pytest
import torch
from tests.support.chaos_client import Answer, Asked, Client, Reading
from tests.support.chaos_endpoint import Component, Endpoint, chaos_endpoint, wait_until
from tests.support.chaos_faults import Fault, inflicted
from tests.support.chaos_table import Table
from tests.support.local_ray import LocalRay
from tests.unit.serve.tiny_folder import TEXT, write_tiny_model

from farspan.models.checkpoint import load_causal_lm, load_tokenizer

pytestmark = pytest.mark.soak

GREEDY = Asked("greedy", {"prompt": TEXT[200:500], "max_tokens": 400, "temperature": 0, "ignore_eos": True})
SEEDED = Asked("seeded", {"prompt": TEXT[900:1300], "max_tokens": 300, "seed": 11, "ignore_eos": True})
PAIR = Asked(
    "pair", {"prompt": TEXT[2000:2200], "max_tokens": 200, "n": 2, "seed": 5, "logprobs": 1, "ignore_eos": True}
)
FORMED = Asked(
    "formed",
    {"prompt": TEXT[3000:3100], "max_tokens": 400, "seed": 3, "structured_outputs": {"regex": "([a-z]{2,7} ){40}"}},
)
LONG = Asked("long", {"prompt": TEXT[:8_000], "max_tokens": 100, "temperature": 0, "ignore_eos": True})
BESIDE = (GREEDY, SEEDED, PAIR, FORMED)
# More pages than all the others together ever hold: what is beyond belongs to the long prompt.
PAGES_BESIDE = 120


class Phase(StrEnum):
    BEFORE = "before"
    """Nobody has begun with any prompt."""
    COMPUTED = "computed"
    """The prefill worker computes a long prompt, the decode worker gives the tokens of others."""
    TRAVELS = "travels"
    """Pages of it have left for the decode worker, which also does that."""
    DECODED = "decoded"
    """Tokens of all answers come."""


def cells() -> Iterator[tuple[str, Component, Fault, Phase]]:
    """Beginning with who listens."""
    yield from (("proxy", *cell) for cell in _cells())
    # What is behind it is the same.
    yield from (("ingress", *cell) for cell in _cells_of_door(Component.INGRESS))
    yield "ingress", Component.DECODE, Fault.KILLED, Phase.DECODED
    yield "ingress", Component.CONTROLLER, Fault.KILLED, Phase.DECODED


def _cells() -> Iterator[tuple[Component, Fault, Phase]]:
    some = (Fault.KILLED, Fault.PAUSED, Fault.FROZEN, Fault.RESET)
    for worker in (Component.PREFILL, Component.DECODE):
        yield from ((worker, fault, phase) for fault in some for phase in Phase)
    yield Component.DECODE, Fault.LEFT, Phase.DECODED
    for beside in (Component.AGENT, Component.CONTROLLER):
        yield from ((beside, fault, phase) for fault in some for phase in (Phase.BEFORE, Phase.COMPUTED))
    yield from ((Component.CONTROLLER, Fault.KILLED, phase) for phase in (Phase.TRAVELS, Phase.DECODED))
    for door in (Component.INGRESS, Component.PROXY):
        yield from _cells_of_door(door)


def _cells_of_door(door: Component) -> Iterator[tuple[Component, Fault, Phase]]:
    yield from ((door, fault, phase) for fault in (Fault.KILLED, Fault.RESET) for phase in Phase)
    yield door, Fault.PAUSED, Phase.DECODED
    yield door, Fault.LEFT, Phase.DECODED


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("chaos") / "tiny"
    write_tiny_model(made)
    return made


@pytest.fixture(scope="module")
def endpoint(request: pytest.FixtureRequest, ray_cluster: LocalRay, folder: Path) -> Iterator[Endpoint]:
    with chaos_endpoint(ray_cluster, folder, folder.parent / f"keys-{request.param}", request.param) as made:
        yield made


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    made = Table()
    yield made
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{made}")


@pytest.fixture(scope="module")
def wanted(endpoint: Endpoint, folder: Path, table: Table) -> dict[str, Answer]:
    """What every request is told while nothing happens; greedy ones are what transformers' own generate gives."""
    client = endpoint.client()
    readings = [client.start(asked, "undisturbed") for asked in (*BESIDE, LONG)]
    answers = {reading.asked.kind: client.whole(reading) for reading in readings}
    table.add("nothing happens", (reading.longest_gap_s for reading in readings))
    for asked in (GREEDY, LONG):
        assert answers[asked.kind].tokens == {0: generated(folder, asked)}
    one, other = answers["pair"].tokens.values()
    assert one != other
    assert answers["formed"].finish == {0: "stop"}
    return answers


def generated(folder: Path, asked: Asked) -> list[int]:
    model, tokenizer = load_causal_lm(folder, torch.float64), load_tokenizer(folder)
    model.generation_config.eos_token_id = None
    prompt = torch.tensor([tokenizer(asked.body["prompt"])["input_ids"]])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=asked.body["max_tokens"],
        do_sample=False,
        pad_token_id=0,
    )
    tokens: list[int] = out[0, prompt.shape[1] :].tolist()
    assert len(set(tokens)) >= 6, f"a vacuous reference: {tokens}"
    return tokens


@pytest.mark.parametrize(("endpoint", "component", "fault", "phase"), list(cells()), indirect=["endpoint"])
def test_every_request_gets_exactly_its_tokens_and_no_page_is_lost(
    endpoint: Endpoint,
    wanted: dict[str, Answer],
    table: Table,
    component: Component,
    fault: Fault,
    phase: Phase,
) -> None:
    client = endpoint.client(asks_again=component in (Component.INGRESS, Component.PROXY))
    (pid,) = endpoint.pids(component)
    workers = {role: endpoint.pids(role) for role in (Component.PREFILL, Component.DECODE) if role is not component}
    with ExitStack() as stack:
        readings = disturbed(endpoint, client, phase, lambda: stack.enter_context(inflicted(pid, fault)))
        for reading in readings:
            same(client.whole(reading), wanted[reading.asked.kind])
            assert all(answer.begins(wanted[reading.asked.kind]) for answer in reading.answers)
    alone = " (listens)" if endpoint.listener == component else ""
    table.add(f"{component}{alone} {fault}", (reading.longest_gap_s for reading in readings))
    report(client, readings)
    if fault in (Fault.KILLED, Fault.LEFT):
        endpoint.wait_replaced(component, pid)
    endpoint.wait_whole()
    assert {role: endpoint.pids(role) for role in workers} == workers, "a worker was replaced that nothing happened to"


def disturbed(endpoint: Endpoint, client: Client, phase: Phase, disturb: Callable[[], None]) -> list[Reading]:
    """All requests under way, disturbed when they have come so far."""
    salt = f"{time.monotonic()}"
    if phase is Phase.BEFORE:
        disturb()
        return [client.start(asked, salt) for asked in (*BESIDE, LONG)]
    readings = [client.start(asked, salt) for asked in BESIDE]
    wait_until(lambda: all(reading.num_pieces > 2 for reading in readings), "tokens of every answer")
    readings.append(client.start(LONG, salt))
    if phase is Phase.COMPUTED:
        wait_until(lambda: (told := endpoint.info(Component.PREFILL)) is not None and told.num_requests > 0, phase)
    elif phase is Phase.TRAVELS:
        wait_until(lambda: held(endpoint) > PAGES_BESIDE, phase)
    else:
        wait_until(lambda: readings[-1].num_pieces > 2, phase)
    assert readings[-1].thread.is_alive(), "too late: it is answered"
    disturb()
    return readings


def held(endpoint: Endpoint) -> int:
    told = endpoint.info(Component.DECODE)
    return 0 if told is None else told.num_pages - told.num_free


def same(answer: Answer, wanted: Answer) -> None:
    assert answer.tokens == wanted.tokens
    assert answer.finish == wanted.finish
    for index, logprobs in wanted.logprobs.items():
        # Computed in other chunks, in float64.
        assert answer.logprobs[index] == pytest.approx(logprobs, abs=1e-9)


def report(client: Client, readings: list[Reading]) -> None:
    """For whoever reads why a cell took as long as it did."""
    for reading in readings:
        trace = client.trace(reading)
        others = trace.get("other_choices", [])
        why = [reason for one in (trace, *others) for reason in one.get("recoveries", [])]
        print(f"{reading.asked.kind:<8}{reading.longest_gap_s:>7.2f} s  {why + reading.problems}")
