"""An engine over ranks answers as one rank does and as transformers does, and never waits for a rank that is lost."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.support.forking import forking
from tests.support.gangs import (
    GREEDY,
    asked,
    assert_chosen,
    assert_same,
    config_for,
    gang_here,
    make,
    tell,
    tell_ranks,
)
from tests.support.ranks import RankPool
from tests.unit.engine.oracle import EAGER, whole_logits
from tests.unit.engine.tiny import engine_config, prompts, tiny_model

from farspan.engine.cut import Share
from farspan.engine.engine import Engine
from farspan.engine.follow import follow
from farspan.engine.gang import Gang
from farspan.engine.probe import exact_experts
from farspan.errors import EngineError, ModelError

_DEADLINE_S = 8.0


def told_by_one(name: str, settings: dict[str, object]):
    layout = Engine(make(name), engine_config()).pool.layout
    place_bytes = layout.page_bytes * layout.num_groups
    return tell(Engine(make(name), config_for(place_bytes, **settings))), place_bytes


@pytest.mark.parametrize(
    ("name", "num_ranks", "settings"),
    [
        ("llama tied", 2, {}),
        ("qwen2", 2, {"draft_tokens": 3}),
        ("gemma2", 2, {}),
        ("qwen3", 2, {"prefix_cache": False}),
        ("mixtral", 2, {}),
        # Two key/value heads: two ranks keep each.
        ("llama of four", 4, {}),
    ],
    ids=str,
)
def test_ranks_answer_as_one_rank_and_as_transformers(ranks: RankPool, name, num_ranks, settings):
    expected, place_bytes = told_by_one(name, settings)
    split = 2 if num_ranks == 4 else num_ranks
    got = ranks.run(tell_ranks, num_ranks, name, place_bytes // split, settings)[0]
    assert got is not None
    assert_same(got, expected)
    model = make(name)
    exact_experts(model)
    for request_id in ("long", "short", "again"):
        prompt, tokens = asked()[request_id], got.tokens(request_id)
        assert len(tokens) == GREEDY.max_tokens
        assert len(set(tokens)) >= 5, f"a vacuous answer: {tokens}"
        # transformers' eager attention, the only one that knows soft caps, has a softmax in single precision.
        tolerance = 1e-5 if name in EAGER else 1e-9
        assert_chosen(whole_logits(model, [*prompt, *tokens]), prompt, tokens, got.logprobs(request_id), tolerance)
    # Windows give pages back before anybody needs them.
    assert (got.preemptions > 0) == (name != "gemma2"), "there were pages enough for all"
    found = max(event[4] for event in got.events if event[0] == "again")
    assert found == (30 if settings.get("prefix_cache", True) else 0)
    # As many pages, each of them a part of the bytes; and a part of the weights.
    assert (got.num_pages, got.page_bytes * split) == (expected.num_pages, expected.page_bytes)
    assert got.weight_bytes < 0.75 * expected.weight_bytes
    # The same model, whose answers may go on elsewhere, but pages that nobody mixes up.
    assert got.model == expected.model
    assert got.layout != expected.layout


def unlike() -> str:
    gang = gang_here()
    model = tiny_model(seed=gang.rank)
    share = Share.of(model, gang)
    config = engine_config(tensor_parallel=gang.size)
    try:
        Engine(model, config, share=share) if gang.leads else follow(model, config, share)
    except ModelError as problem:
        return str(problem)
    return "nothing was noticed"


def test_ranks_with_different_weights_are_refused_on_every_rank(ranks: RankPool):
    told = ranks.run(unlike, 2)
    assert all("rank 1 has another model" in line for line in told), told


def falls_silent(store: str) -> tuple[str, float] | None:
    """The leader's error, and how long it took, where the other rank stops taking part after some iterations."""
    gang = gang_here(_DEADLINE_S)
    done = dist.FileStore(store, gang.size)
    model, config = tiny_model(), engine_config(tensor_parallel=gang.size)
    share = Share.of(model, gang)
    if not gang.leads:
        hear, heard = gang.hear, []

        class Sleeper(Gang):
            def hear(self):
                if len(heard) == 3:
                    done.wait(["over"], timedelta(seconds=120))
                    raise EngineError("woken")
                heard.append(hear())
                return heard[-1]

        with pytest.raises(EngineError, match="woken"):
            follow(model, config, Share(Sleeper(gang.control, gang.compute, 1.0), share.fingerprint, share.expected))
        return None
    engine = Engine(model, config, share=share)
    engine.add("r", prompts(20)[0], GREEDY)
    began_s, problem = time.monotonic(), ""
    try:
        while engine.has_work and not problem:
            try:
                engine.step()
            except EngineError as lost:
                problem = str(lost)
        took_s = time.monotonic() - began_s
        assert engine.lost == problem
        with pytest.raises(EngineError, match="another rank is lost"):
            engine.step()
    finally:
        done.set("over", "")
        engine.close()
    return problem, took_s


def test_a_rank_that_falls_silent_ends_the_engine_within_the_deadline(ranks: RankPool, tmp_path):
    problem, took_s = ranks.run(falls_silent, 2, str(tmp_path / "done"))[0]
    assert "rank 0 of 2: another rank is lost, or was silent for 8 s" in problem
    assert took_s < 4 * _DEADLINE_S


def run_rank(rank: int, store: str, pipe: Connection) -> None:
    """A rank in a process of its own: says what ended it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    gang = gang_here(120.0)
    model, config = tiny_model(), engine_config(tensor_parallel=2)
    share = Share.of(model, gang)
    try:
        if rank > 0:
            pipe.send("ready")
            follow(model, config, share)
            pipe.send("told to end")
            return
        engine = Engine(model, config, share=share)
        pipe.send("ready")
        while not engine.lost:
            if not engine.has_work:
                engine.add("r", prompts(20)[0], GREEDY)
            engine.step()
    except EngineError as problem:
        pipe.send(str(problem))
    finally:
        # Nobody is left to meet in an orderly end.
        os._exit(0)


@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.soak)])
def test_when_a_rank_is_killed_the_others_end_at_once(killed, tmp_path: Path):
    context = forking()
    pipes = [context.Pipe() for _ in range(2)]
    processes = [
        context.Process(target=run_rank, args=(rank, str(tmp_path / "store"), theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        for ours, _ in pipes:
            assert ours.poll(120)
            assert ours.recv() == "ready"
        os.kill(processes[killed].pid or 0, signal.SIGKILL)
        began_s = time.monotonic()
        ours = pipes[1 - killed][0]
        assert ours.poll(60), "it waits for a process that is dead"
        assert "another rank is lost" in ours.recv()
        # Long before the deadline of 120 s: a connection that ends is noticed.
        assert time.monotonic() - began_s < 60
    finally:
        for process in processes:
            process.kill()
            process.join(timeout=30)
