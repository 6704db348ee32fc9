"""What KV costs on its way from a prefill worker to a decode worker over TCP: `farspan bench transfer`.

Two processes, each an engine host over NIXL, as in two replicas; this one passes their messages on, as the ingress
does. Measured are the time between the last computed token and the last verified page, as a part of the time that the
prompt takes, with pages fetched meanwhile and only afterwards, in turns; and the speed of whole transfers beside bare
NIXL reads of the same pages into the same process, in turns too.
"""

from __future__ import annotations

import logging
import multiprocessing
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from farspan.engine.request import SamplingParams
from farspan.errors import ClusterError
from farspan.kv.ticket import KvOffer, KvTicket
from farspan.serve.bench_transfer_worker import Answered, Prompted, TransferBench, run_worker
from farspan.serve.messages import Failed, GenerationRequest

logger = logging.getLogger(__name__)

GOAL_EXPOSED, GOAL_BANDWIDTH = 0.05, 0.9
MEANWHILE, AFTERWARDS = "pages fetched meanwhile", "pages fetched afterwards"
BARE, OURS = "bare NIXL", "farspan, every page verified"
_START_DEADLINE_S, _END_S = 300.0, 30.0
_ANSWERED = 4


class Worker:
    """A process that is asked through a pipe."""

    def __init__(self, role: str, pipe: Any, process: Any) -> None:
        self.role, self._pipe, self._process = role, pipe, process

    def tell(self, verb: str, *arguments: Any) -> None:
        self._pipe.send((verb, *arguments))

    def hear(self, deadline_s: float) -> Any:
        """Its next word. Raises ClusterError when it says nothing in time, or died."""
        try:
            if self._pipe.poll(deadline_s):
                said = self._pipe.recv()
                if isinstance(said, Failed):
                    raise ClusterError(f"the {self.role} worker: {said.error}")
                return said
        except (EOFError, ConnectionResetError):
            raise ClusterError(f"the {self.role} worker died (code {self._process.exitcode})") from None
        raise ClusterError(f"the {self.role} worker said nothing within {deadline_s:g} s")


@contextmanager
def worker(role: str, bench: TransferBench) -> Iterator[Worker]:
    """A worker that is ready; its process has ended afterwards."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=run_worker, args=(role, theirs, bench), daemon=True)
    process.start()
    theirs.close()
    try:
        made = Worker(role, ours, process)
        made.hear(_START_DEADLINE_S)
        yield made
    finally:
        ours.close()
        process.join(_END_S)
        if process.is_alive():
            process.kill()
            process.join(_END_S)


def bench_transfer(bench: TransferBench | None = None) -> list[dict[str, Any]]:
    """A row for each way to fetch, then one for each way to copy. A wrong answer has `wrong` in its row.

    Raises ClusterError when a worker died.
    """
    bench = bench or TransferBench()
    with worker("prefill", bench) as prefill, worker("decode", bench) as decode:
        pair = _Pair(bench, prefill, decode)
        pair.ask(0, follow=True)
        turns = {MEANWHILE: list[_Turn](), AFTERWARDS: list[_Turn]()}
        for number in range(bench.turns):
            for way, found in turns.items():
                found.append(pair.ask(1 + 2 * number + (way == AFTERWARDS), follow=way == MEANWHILE))
                logger.info("%s: %.1f of %.0f ms", way, found[-1].exposed_s * 1e3, found[-1].prefill_s * 1e3)
        copies = pair.copy()
    return [*(_row(bench, way, found) for way, found in turns.items()), *_copy_rows(bench, copies)]


@dataclass(frozen=True, slots=True)
class _Turn:
    prefill_s: float
    exposed_s: float
    num_bytes: int
    early: float
    """Part of the pages that were fetched before the prompt was computed."""
    is_right: bool


class _Pair:
    def __init__(self, bench: TransferBench, prefill: Worker, decode: Worker) -> None:
        self._bench, self._prefill, self._decode = bench, prefill, decode

    def ask(self, seed: int, *, follow: bool) -> _Turn:
        """One new prompt, computed by one and answered by the other."""
        request = self._request(seed)
        prompted, ticket = self._compute(request, follow=follow)
        first = (prompted.prefilled.token,)
        self._decode.tell("answer", request, first, ticket)
        found = self._hear(self._decode, Answered)
        self._prefill.tell("release", ticket.ticket_id)
        self._prefill.tell("answer", request, (), None)
        alone = self._hear(self._prefill, Answered)
        return _Turn(
            prompted.ended_s - prompted.began_s,
            found.pulled_at_s - prompted.ended_s,
            ticket.num_bytes,
            found.pulled.num_early / len(ticket.pages),
            found.tokens == alone.tokens,
        )

    def copy(self) -> dict[str, list[float]]:
        """Bytes per second of each whole transfer of the pages of one prompt, and of bare reads of them."""
        request = self._request(-1)
        prompted, ticket = self._compute(request, follow=False)
        found: dict[str, list[float]] = {BARE: [], OURS: []}
        for number in range(1 + self._bench.copies):
            self._decode.tell("read", ticket)
            found[BARE].append(ticket.num_bytes / self._hear(self._decode, float))
            name = f"copy{number}"
            asked = replace(request, request_id=name), (prompted.prefilled.token,), replace(ticket, request_id=name)
            self._decode.tell("pull", *asked)
            found[OURS].append(ticket.num_bytes / self._hear(self._decode, Answered).pulled.seconds)
        self._prefill.tell("release", ticket.ticket_id)
        # The first of each connects.
        return {name: speeds[1:] for name, speeds in found.items()}

    def _compute(self, request: GenerationRequest, *, follow: bool) -> tuple[Prompted, KvTicket]:
        self._prefill.tell("prefill", request, follow)
        while not isinstance(said := self._prefill.hear(self._bench.deadline_s), Prompted):
            assert isinstance(said, KvOffer)
            self._decode.tell("follow", said)
        assert said.prefilled.ticket is not None, "an answer of several tokens goes on"
        return said, said.prefilled.ticket

    def _request(self, seed: int) -> GenerationRequest:
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(self._bench.settings["vocab_size"], (self._bench.num_tokens,), generator=generator)
        params = SamplingParams(max_tokens=_ANSWERED, ignore_eos=True)
        return GenerationRequest(f"prompt{seed}", tuple(prompt.tolist()), params)

    def _hear(self, worker: Worker, kind: type[Any]) -> Any:
        said = worker.hear(self._bench.deadline_s)
        assert isinstance(said, kind), f"{worker.role} said {said}"
        return said


def _row(bench: TransferBench, way: str, turns: list[_Turn]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "work": f"prompt of {bench.num_tokens} tokens over {bench.transport}, {way}",
        "kv_bytes": turns[0].num_bytes,
        "prefill_s": statistics.median(turn.prefill_s for turn in turns),
        "exposed_s": statistics.median(turn.exposed_s for turn in turns),
        "pages fetched early": statistics.median(turn.early for turn in turns),
        "exposed / prefill": statistics.median(turn.exposed_s / turn.prefill_s for turn in turns),
    }
    if way == MEANWHILE:
        row["goal"] = GOAL_EXPOSED
    if not all(turn.is_right for turn in turns):
        row["wrong"] = "the answer is not that of one worker alone"
    return row


def _copy_rows(bench: TransferBench, speeds: dict[str, list[float]]) -> list[dict[str, Any]]:
    work = f"the same pages over {bench.transport}"
    return [
        {"work": work, "contender": BARE, "bytes_per_s": statistics.median(speeds[BARE])},
        {
            "work": work,
            "contender": OURS,
            "bytes_per_s": statistics.median(speeds[OURS]),
            "farspan / bare": statistics.median(a / b for a, b in zip(speeds[OURS], speeds[BARE], strict=True)),
            "goal": GOAL_BANDWIDTH,
        },
    ]
