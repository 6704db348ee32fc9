"""The log of a run whose folder is in an object store."""

from __future__ import annotations

from tests.support.s3 import S3Bucket

from farspan.cli.record import EVENTS_FILE, run_log
from farspan.telemetry.events import CheckpointPublished, Note


def test_a_log_in_s3_is_as_new_as_the_newest_checkpoint_while_the_run_goes_on(s3: S3Bucket) -> None:
    with run_log(f"{s3.uri}/run") as log:
        log.append(Note(text="before"))
        assert s3.keys() == []
        log.append(CheckpointPublished(step=1, uri="s3://b/run/checkpoints/step-1", seconds=1.0, bytes=1))
        assert b"before" in s3.get(f"run/{EVENTS_FILE}")
        log.append(Note(text="after"))
    assert b"after" in s3.get(f"run/{EVENTS_FILE}")
    with run_log(f"{s3.uri}/run") as log:
        log.append(Note(text="again"))
    assert all(word in s3.get(f"run/{EVENTS_FILE}") for word in (b"before", b"after", b"again"))
