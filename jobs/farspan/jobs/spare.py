"""A spare process beside each worker that has imported what a worker imports: whoever takes the worker's place has it.

Ray hands an idle process to the next actor of the job that wants the same environment. It starts one ahead when its
node is asked to (as Ray's own core asks), and runs a hook in each new process of an environment that names one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

from farspan.config.schema import RunConfig
from farspan.jobs.knock import authorized, open_channel
from farspan.telemetry.events import EventBody, StepReport

logger = logging.getLogger(__name__)

_HOOK = "farspan.jobs.worker.import_training"
_CALL = "/ray.rpc.NodeManagerService/PrestartWorkers"
# As long as the run, in practice: Ray ends it with the job.
_KEPT_S, _PATIENCE_S = 7 * 24 * 3600, 5.0


def spare_environment(config: RunConfig, job: Mapping[str, Any]) -> dict[str, Any]:
    """The runtime environment of a run's workers, beside that of the job; empty: no spares are kept.

    Only a run that goes on with the hosts that are left gains by them: otherwise it waits for one without a spare. And
    a process may not ask for GPUs before it is told which ones are its own, so none waits where there are some.
    """
    elastic = config.parallel.min_workers > 0 and config.resources.gpus_per_worker == 0
    taken = WORKER_PROCESS_SETUP_HOOK_ENV_VAR in job.get("env_vars", {})
    return {"env_vars": {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: _HOOK}} if elastic and not taken else {}


def with_spare(tell: Callable[[EventBody], None], ask: Callable[[], None]) -> Callable[[EventBody], None]:
    """`tell`, and `ask` once, after the first step: what a spare imports does not keep the run from beginning."""
    asked = False

    def told(body: EventBody) -> None:
        nonlocal asked
        tell(body)
        if isinstance(body, StepReport) and not asked:
            asked = True
            ask()

    return told


def ask_for_spare() -> None:
    """Ask this node for an idle process of this process's environment. Without it a restart takes longer, no more."""
    try:
        _ask()
    # Whatever a Ray that has moved these parts, or a head that just starts again, raises.
    except Exception as problem:
        logger.info("no spare process is kept: %s", problem)


def _ask() -> None:
    from ray._private.utils import get_runtime_env_info
    from ray.core.generated.common_pb2 import PYTHON
    from ray.core.generated.node_manager_pb2 import PrestartWorkersReply, PrestartWorkersRequest

    here = ray.get_runtime_context()
    node = next(found for found in ray.nodes() if found["NodeID"] == here.get_node_id())
    environment = get_runtime_env_info(here.runtime_env)
    # Letter for letter: Ray compares environments by what they are written as.
    environment.serialized_runtime_env = here.get_runtime_env_string()
    request = PrestartWorkersRequest(
        language=PYTHON,
        job_id=bytes.fromhex(here.get_job_id()),
        runtime_env_info=environment,
        keep_alive_duration_secs=_KEPT_S,
        num_workers=1,
    )
    with open_channel(node["NodeManagerAddress"], node["NodeManagerPort"]) as channel:
        call = channel.unary_unary(
            _CALL,
            request_serializer=PrestartWorkersRequest.SerializeToString,
            response_deserializer=PrestartWorkersReply.FromString,
        )
        call(request, timeout=_PATIENCE_S, metadata=authorized())
