"""Roles are quotas that follow what arrives: no ratio is set, nobody idles, and no fixed ratio does better."""

from __future__ import annotations

import math
import random
from itertools import count

import pytest
from tests.support.serve_simulator import MAX_BATCH, MAX_SEQUENCES, Cluster, Job
from tests.unit.serve.loads import worker

from farspan.engine.request import SamplingParams
from farspan.serve.autoscale import Objectives
from farspan.serve.guide import Guide
from farspan.serve.load import WorkerLoad
from farspan.serve.messages import GenerationRequest
from farspan.serve.policy import Route, Rules
from farspan.serve.quotas import NO_QUOTA, Demand, Quota, Roles, in_force, share_quotas

FOUR = [worker("a", "prefill"), worker("b", "prefill"), worker("c"), worker("d")]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.6, 0.9, 1.0])
def test_all_workers_together_give_prompts_their_share_and_most_do_one_thing(share):
    given = share_quotas(FOUR, share)
    batch, rows = FOUR[0].max_batch_tokens, FOUR[0].max_sequences
    prefill = [batch if q.prefill_tokens is None else q.prefill_tokens for q in given.values()]
    assert sum(prefill) / (4 * batch) == pytest.approx(share, abs=0.08)
    assert sum(16 < tokens < batch for tokens in prefill) <= 1
    decode = [rows if q.decode_tokens is None else q.decode_tokens for q in given.values()]
    assert sum(decode) / (4 * rows) == pytest.approx(1 - share, abs=0.15)
    # Everything gets on everywhere.
    assert min(prefill) >= 16
    assert min(decode) >= 1
    assert sorted(prefill, reverse=True) == prefill


def test_workers_for_prompts_give_first():
    given = share_quotas(list(reversed(FOUR)), 0.25)
    assert given["a"] == Quota(None, 1)
    assert given["c"] == given["d"] == Quota(16, None)


def test_a_quota_holds_only_while_there_is_work_of_both_kinds():
    quota, most = Quota(16, 1), Quota(2048, 64)
    assert in_force(quota, 0, 5, most) == in_force(quota, 5, 0, most) == NO_QUOTA
    assert in_force(NO_QUOTA, 3, 5, most) == NO_QUOTA


def test_whatever_its_role_a_worker_gets_done_what_it_was_sent():
    most = Quota(2048, 64)
    # Sixteen prompts beside a stream are not computed in pieces of 16 tokens, nor does the stream wait for all of them.
    assert in_force(Quota(16, None), 16, 1, most) == Quota(math.ceil(2048 * 16 / 17), None)
    assert in_force(Quota(None, 1), 16, 1, most) == Quota(None, 4)
    assert in_force(Quota(16, None), 1, 15, most) == Quota(128, None)
    assert in_force(Quota(1000, 60), 1, 15, most) == Quota(1000, 60)


def test_roles_move_when_what_arrives_has_changed_and_not_before():
    roles = Roles()
    assert set(roles.assign(FOUR, Demand(0, 0)).values()) == {NO_QUOTA}
    first = roles.assign(FOUR, Demand(1.0, 1.0))
    assert roles.assign(FOUR, Demand(1.1, 1.0)) == first
    assert roles.assign(FOUR, Demand(0, 0)) == first
    assert roles.assign(FOUR, Demand(3.0, 1.0)) == share_quotas(FOUR, 0.75)


FIRST_TOKEN_S, TOKEN_S = 1.0, 0.03
HALF_S = 20.0


def flipping(seed: int) -> list[Job]:
    """Nine of ten are long prompts with short answers, then nine of ten are the other way round."""
    rng, jobs, at_s = random.Random(seed), list[Job](), 0.0
    while at_s < 2 * HALF_S:
        prompts = rng.random() < (0.9 if at_s < HALF_S else 0.1)
        at_s += rng.expovariate(16.0 if at_s < HALF_S else 12.0)
        prompt, answer = (rng.randint(1000, 2000), rng.randint(4, 12)) if prompts else (100, rng.randint(200, 400))
        jobs.append(Job(at_s, prompt, answer))
    return jobs


def goodput(jobs: list[Job]) -> float:
    """Requests a second that were answered as they should be."""
    return sum(job.meets(FIRST_TOKEN_S, TOKEN_S) for job in jobs) / (2 * HALF_S)


def fixed(num_prefill: int, seed: int) -> float:
    """The first workers compute prompts, the others decode: each the one with the least to do."""

    def route(cluster: Cluster, job: Job) -> tuple[int, int]:
        prefill, decode = cluster.machines[:num_prefill], cluster.machines[num_prefill:]
        first = min(prefill, key=lambda m: m.queue_tokens)
        coming = [sum(job.decodes_on == m.number for p in prefill for job in p.prompts) for m in decode]
        then = min(range(len(decode)), key=lambda n: len(decode[n].decoding) + coming[n])
        return first.number, decode[then].number

    jobs = flipping(seed)
    Cluster(4, route).run(jobs, 3 * HALF_S)
    return goodput(jobs)


def adaptive(seed: int) -> tuple[float, list[int]]:
    """Goodput, and how many workers were for prompts alone in each second: by the guide as it stands."""
    roles: list[int] = []
    routes: dict[int, Route] = {}
    numbers = count()

    def standing(cluster: Cluster) -> list[WorkerLoad]:
        return [
            worker(
                str(m.number),
                "prefill" if m.number < 2 else "decode",
                max_batch_tokens=MAX_BATCH,
                max_sequences=MAX_SEQUENCES,
                token_bytes=0.0,
                prefill_tokens=m.quota.prefill_tokens,
                decode_tokens=m.quota.decode_tokens,
                queue_tokens=m.queue_tokens,
                num_waiting=len(m.prompts),
                num_running=len(m.decoding),
                kv_tokens=m.kv_tokens,
            )
            for m in cluster.machines
        ]

    def hear(cluster: Cluster) -> None:
        for load in standing(cluster):
            guide.heard(load, cluster.now_s)

    def route(cluster: Cluster, job: Job) -> tuple[int, int]:
        hear(cluster)
        # Not the address of the job: ways that are as good are decided by the name, and it must be the same every time.
        request = GenerationRequest(str(next(numbers)), (1,) * job.prompt, SamplingParams(max_tokens=400))
        chosen = guide.route(request)
        guide.arrived(chosen, job.prompt)
        routes[id(job)] = chosen
        assert chosen.decode is not None
        return int((chosen.prefill or chosen.decode).worker), int(chosen.decode.worker)

    def tick(cluster: Cluster) -> None:
        hear(cluster)
        for name, orders in guide.orders().items():
            cluster.machines[int(name)].quota = orders.quota or NO_QUOTA
        roles.append(sum(m.quota.prefill_tokens is None for m in cluster.machines))

    def finished(job: Job) -> None:
        chosen = routes.pop(id(job))
        guide.first_token(chosen, job.prompt, 0, job.first_s - job.at_s)
        guide.tokens(job.answer)
        guide.answered(chosen, job.prompt, job.answer, job.end_s - job.first_s)

    cluster = Cluster(4, route, tick)
    cluster.finished = finished
    guide = Guide(Rules(), Objectives(FIRST_TOKEN_S, TOKEN_S), clock=lambda: cluster.now_s)
    jobs = flipping(seed)
    cluster.run(jobs, 3 * HALF_S)
    return goodput(jobs), roles


@pytest.mark.parametrize("seed", [1, 2])
def test_when_the_load_turns_round_roles_follow_and_no_fixed_roles_do_better(seed):
    best = max(fixed(num_prefill, seed) for num_prefill in (1, 2, 3))
    found, roles = adaptive(seed)
    assert found >= best
    # In the last second of either half.
    assert roles[int(HALF_S) - 1] == 3
    assert roles[int(2 * HALF_S) - 1] < 3
