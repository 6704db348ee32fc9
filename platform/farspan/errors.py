"""Every error farspan raises on purpose.

FarspanError
├── ConfigError          what a user wrote: a field, the rule it breaks, its value, the nearest legal way out
├── StorageError         a file, folder or object store did not do what was asked
│   ├── NotFoundError        nothing is there
│   ├── UnreachableError     it may be there, but it could not be read or written
│   │   └── NoAnswerError        the place does not answer now, and may later
│   └── CorruptDataError     it is there, and its bytes are not the ones that were written
├── CheckpointError      a checkpoint folder that cannot be used
├── ModelError           a model farspan cannot run exactly
├── PlanError            no legal plan
├── TrainingError        a run that had to stop
│   ├── OutOfMemoryError     a rank had no memory left for a step
│   └── VerifyError          the sharded run no longer computes what one process computes
├── TierError            a memory tier did not do what was asked
│   └── TierFullError        it has no room left
├── StaleBufferError     a buffer was used again while somebody still read or wrote it
├── EngineError          the inference engine could not answer
│   └── RequestError         one request could not be answered; the others go on
├── TransferError        KV pages did not arrive as they were sent
└── ClusterError         a Ray cluster, job or deployment did not do what was asked

Each one survives pickling with its fields, because Ray carries exceptions between processes.
"""

from __future__ import annotations

from typing import Any


class FarspanError(Exception):
    """Root of the tree. Subclasses with fields pass them to `__init__` in order through `_fields`."""

    _fields: tuple[str, ...] = ()

    # The default rebuild passes the message as the first field.
    def __reduce__(self) -> tuple[Any, ...]:
        if not self._fields:
            return type(self), self.args
        return type(self), tuple(getattr(self, name) for name in self._fields)


class ConfigError(FarspanError, ValueError):
    """One thing a user wrote, in one sentence: `field: rule, got value; way out`."""

    _fields = ("field", "rule", "value", "way_out")

    def __init__(self, field: str, rule: str, value: object, way_out: str) -> None:
        self.field, self.rule, self.value, self.way_out = field, rule, value, way_out
        super().__init__(f"{field}: {rule}, got {value!r}; {way_out}")


class StorageError(FarspanError):
    """A file, folder or object store did not do what was asked."""

    _fields = ("uri", "reason")

    def __init__(self, uri: str, reason: str) -> None:
        self.uri, self.reason = uri, reason
        super().__init__(f"{uri}: {reason}")


class NotFoundError(StorageError):
    """Nothing is there."""


class UnreachableError(StorageError):
    """It may be there, but it could not be read or written."""


class NoAnswerError(UnreachableError):
    """The place does not answer now, and may later."""


class CorruptDataError(StorageError):
    """It is there, and its bytes are not the ones that were written."""


class CheckpointError(StorageError):
    """A checkpoint folder that cannot be used."""


class ModelError(FarspanError):
    """A model farspan cannot run exactly."""


class PlanError(FarspanError):
    """No legal plan."""


class TrainingError(FarspanError):
    """A run that had to stop."""


class OutOfMemoryError(TrainingError):
    """A rank had no memory left for a step; step 0 is what comes before the first."""

    _fields = ("rank", "step", "reason")

    def __init__(self, rank: int, step: int, reason: str) -> None:
        self.rank, self.step, self.reason = rank, step, reason
        super().__init__(f"rank {rank} ran out of memory in step {step}: {reason}")


class TierError(FarspanError):
    """A memory tier did not do what was asked."""

    _fields: tuple[str, ...] = ("tier", "reason")

    def __init__(self, tier: str, reason: str) -> None:
        self.tier, self.reason = tier, reason
        super().__init__(f"memory tier {tier}: {reason}")


class TierFullError(TierError):
    """It has no room left."""

    _fields: tuple[str, ...] = ("tier", "owner", "wanted_bytes", "free_bytes", "capacity_bytes")

    def __init__(self, tier: str, owner: str, wanted_bytes: int, free_bytes: int, capacity_bytes: int) -> None:
        self.owner, self.wanted_bytes, self.free_bytes = owner, wanted_bytes, free_bytes
        self.capacity_bytes = capacity_bytes
        super().__init__(
            tier,
            f"{owner} asked for {wanted_bytes} bytes, {free_bytes} of {capacity_bytes} are free; "
            f"give the tier at least {capacity_bytes - free_bytes + wanted_bytes} bytes or use a larger one",
        )


class StaleBufferError(FarspanError):
    """A buffer was used again while somebody still read or wrote it."""


class VerifyError(TrainingError):
    """The sharded run no longer computes what one process computes."""


class EngineError(FarspanError):
    """The inference engine could not answer."""


class RequestError(EngineError):
    """One request could not be answered; the others go on."""

    _fields = ("request_id", "reason")

    def __init__(self, request_id: str, reason: str) -> None:
        self.request_id, self.reason = request_id, reason
        super().__init__(f"request {request_id}: {reason}")


class TransferError(FarspanError):
    """KV pages did not arrive as they were sent."""

    _fields = ("request_id", "reason")

    def __init__(self, request_id: str, reason: str) -> None:
        self.request_id, self.reason = request_id, reason
        super().__init__(f"request {request_id}: KV transfer failed: {reason}")


class ClusterError(FarspanError):
    """A Ray cluster, job or deployment did not do what was asked."""
