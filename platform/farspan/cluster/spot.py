"""EC2's word that a spot node is about to be taken back, as plain values.

Source: "Spot Instance interruption notices", https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime

TOKEN_PATH = "/latest/api/token"
TOKEN_TTL = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
TOKEN_HEADER = "X-aws-ec2-metadata-token"
NOTICE_PATH = "/latest/meta-data/spot/instance-action"


@dataclass(frozen=True, slots=True)
class SpotNotice:
    """What EC2 will do with this machine, and when."""

    action: str
    """terminate, stop or hibernate."""
    at: datetime


def read_notice(text: str, now: datetime) -> SpotNotice:
    """The notice in the body of an answer. One that cannot be read is still a notice: for now, of an unknown kind."""
    try:
        said = json.loads(text)
        at = datetime.fromisoformat(said["time"]) if "time" in said else now
        # EC2 writes UTC; a time without a zone is one.
        return SpotNotice(str(said["action"]), at if at.tzinfo is not None else at.replace(tzinfo=UTC))
    except (ValueError, TypeError, KeyError):
        return SpotNotice("unknown", now)


def seconds_left(notice: SpotNotice, now: datetime) -> int:
    """Whole seconds until it happens; 0 once it is due."""
    return max(0, int((notice.at - now).total_seconds()))
