"""What a worker of xdist takes as a whole: a file, and all files that start a Ray together."""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling

# These share a Ray, or start others that want the machine for themselves.
_WITH_RAY = ("tests/cluster/", "tests/end_to_end/")


class OneRayScheduling(LoadFileScheduling):
    """`--dist loadfile`, for which the tests with Ray are one file: they run one after another, beside the others."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "with ray" if file.startswith(_WITH_RAY) else file
