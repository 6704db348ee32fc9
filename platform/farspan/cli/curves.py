"""A run's numbers for TensorBoard, under the names of `telemetry.names`; only where its package is installed."""

from __future__ import annotations

import importlib.util
from types import TracebackType
from typing import Any

from farspan.errors import ConfigError
from farspan.storage.paths import LocalPlace, parse_uri
from farspan.telemetry.events import EventBody, StepReport
from farspan.telemetry.names import METRICS


class Curves:
    """Writes each step's numbers; does nothing without a place to write them to."""

    def __init__(self, output: str | None) -> None:
        """`output` is the run's folder.

        Raises:
            ConfigError: the package is missing, or the folder is not on a disk.
        """
        self._writer: Any = None
        if output is None:
            return
        field = "telemetry.tensorboard"
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError(field, "needs the package tensorboard", True, "run `pip install tensorboard`")
        place = parse_uri(output)
        if not isinstance(place, LocalPlace):
            raise ConfigError(field, "needs an output on a disk", output, "leave it out, or choose a local output")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(place.folder / "tensorboard"))

    def record(self, body: EventBody) -> None:
        """Draw what a step says."""
        if self._writer is None or not isinstance(body, StepReport):
            return
        for metric in METRICS:
            kind, _, name = metric.source.partition(".")
            if kind == "step" and name != "step":
                self._writer.add_scalar(metric.name, getattr(body, name), body.step)

    def __enter__(self) -> Curves:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
