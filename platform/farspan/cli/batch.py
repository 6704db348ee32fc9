"""`farspan batch`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from farspan.cli.progress import BatchProgressBar
from farspan.config.load import load_config
from farspan.config.schema import BatchConfig
from farspan.config.serve_rules import check_engine
from farspan.errors import ConfigError
from farspan.storage.paths import LocalPlace, absolute_uri, parse_uri

if TYPE_CHECKING:
    from farspan.config.schema import EngineConfig
    from farspan.engine.offline import Progress
    from farspan.engine.request import SamplingParams


@dataclass(frozen=True)
class BatchAsk:
    """One command line."""

    prompts: str
    model: str
    output: str
    overrides: list[str]
    params: SamplingParams
    engines: int
    join: bool


def run_batch(ask: BatchAsk) -> None:
    """Answer a file of prompts, in this process or by engines on Ray; what is answered already is skipped."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = load_config(BatchConfig, None, ask.overrides).engine
    check_engine(config)
    # Engines on Ray have another working directory.
    config = replace(config, adapters={name: absolute_uri(folder) for name, folder in config.adapters.items()})
    if config.draft_model is not None:
        config = replace(config, draft_model=absolute_uri(config.draft_model))
    if ask.join and not ask.engines:
        raise ConfigError("--join", "must come with --engines", True, "add for example --engines 4")
    prompts, output = _local("PROMPTS", ask.prompts), _local("--output", ask.output)
    if prompts == output:
        raise ConfigError("--output", "must not be the file of prompts", ask.output, "choose another file")
    with BatchProgressBar() as bar:
        progress = (_run_on_ray if ask.engines else _run_here)(ask, config, prompts, output, bar)
    bar.finish(progress, str(output))


def _run_here(ask: BatchAsk, config: EngineConfig, prompts: Path, output: Path, bar: BatchProgressBar) -> Progress:
    import torch

    from farspan.engine.offline import OfflineEngine, run_offline
    from farspan.models.address import fetch_model

    if config.threads:
        torch.set_num_threads(config.threads)
    folder = fetch_model(absolute_uri(ask.model))
    return run_offline(OfflineEngine.open(folder, config), prompts, output, ask.params, bar)


def _run_on_ray(ask: BatchAsk, config: EngineConfig, prompts: Path, output: Path, bar: BatchProgressBar) -> Progress:
    from farspan.jobs.batch import run_batch as run_on_ray
    from farspan.jobs.launch import joined_ray, local_ray

    started = joined_ray() if ask.join else local_ray(ask.engines * max(config.threads, 1))
    with started:
        return run_on_ray(absolute_uri(ask.model), config, prompts, output, ask.params, ask.engines, bar)


def _local(name: str, path: str) -> Path:
    place = parse_uri(absolute_uri(path))
    if not isinstance(place, LocalPlace):
        raise ConfigError(name, "must be a file on a disk", path, "copy it, or write beside it and copy afterwards")
    return place.folder
