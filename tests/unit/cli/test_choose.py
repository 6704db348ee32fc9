"""What a config leaves open is chosen by the planner; what it sets stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.runs import tiny_run

from farspan.cli.choose import Chosen, as_written, choose_plan
from farspan.config.check import check_run
from farspan.config.load import written_keys
from farspan.config.schema import RunConfig
from farspan.models.checkpoint import make_config

EIGHT_B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
ON_H100 = ["resources.gpus_per_worker=1", "plan.gpu=h100", "parallel.workers=8", "model.dtype=bfloat16"]

MEASURED = ["train.recompute=true", "memory.offload_activations=cpu", "memory.swap_share=auto"]


def chosen(*overrides: str) -> Chosen:
    config: RunConfig = tiny_run("nowhere", "nowhere/run", *ON_H100, *overrides, **EIGHT_B)
    written = written_keys(None, [*ON_H100, *overrides])
    return choose_plan(config, written, make_config("llama", config.model.settings))


@pytest.mark.parametrize("tokens", [16384, 524288])
def test_a_run_on_gpus_gets_a_plan_that_fits_and_a_prediction(tokens: int) -> None:
    found = chosen(f"data.sequence_tokens={tokens}", f"model.settings.max_position_embeddings={tokens}")
    check_run(found.config)
    assert found.config.data.sequence_tokens == tokens
    assert found.predicted is not None
    assert found.predicted.step_s > 0
    assert 1 << 30 < found.predicted.device_bytes < 80 << 30
    levers = (found.config.train.recompute, found.config.memory.chunk != "none", found.config.memory.tiled_mlp)
    assert any(levers) or tokens == 16384


def test_longer_sequences_get_more_levers() -> None:
    short, long = (chosen(f"data.sequence_tokens={tokens}").config for tokens in (8192, 1 << 20))
    assert (long.parallel.sp, long.train.recompute or long.memory.chunk != "none") > (short.parallel.sp, False)


def test_what_the_user_set_stays_as_it_is() -> None:
    said = ["parallel.sp=4", "parallel.strategy=ring", "train.recompute=true"]
    config = chosen("data.sequence_tokens=65536", *said).config
    assert (config.parallel.sp, config.parallel.strategy, config.train.recompute) == (4, "ring", True)


def test_no_plan_is_chosen_that_the_config_refuses() -> None:
    config = chosen("data.sequence_tokens=16384", *MEASURED).config
    check_run(config)
    assert config.memory.swap_share == "auto"
    assert (config.weights.engine, config.memory.chunk) == ("fsdp2", "none")


def test_where_every_plan_that_fits_is_refused_the_config_runs_as_written_and_says_why() -> None:
    found = chosen("data.sequence_tokens=4194304", "parallel.sp=8", *MEASURED)
    check_run(found.config)
    assert (found.config.weights.engine, found.config.memory.chunk) == ("fsdp2", "none")
    (what, why), (beside, share) = found.lines
    assert (what, beside) == ("planner", "swap")
    assert share.startswith("memory.swap_share=auto is predicted to be ")
    assert why.startswith("as written; ")
    assert "GiB" in why
    assert "is refused: memory.swap_share: is measured on one whole sequence" in why


@pytest.mark.long
def test_a_config_that_no_plan_fits_runs_as_written_and_says_why() -> None:
    said = ["parallel.sp=1", "train.recompute=false", "memory.chunk=none", "memory.offload_activations=none"]
    found = chosen("data.sequence_tokens=1048576", *said)
    assert found.config.parallel.sp == 1
    ((what, why),) = found.lines
    assert what == "planner"
    assert why.startswith("as written; ")
    assert "GiB" in why


def test_on_cpus_nothing_is_chosen_unless_it_is_asked_for() -> None:
    config = tiny_run("nowhere", "nowhere/run")
    assert choose_plan(config, frozenset(), make_config("llama", config.model.settings)) == Chosen(config)
    never = as_written(tiny_run("nowhere", "nowhere/run", *ON_H100))
    assert choose_plan(never, frozenset(), make_config("llama", never.model.settings)) == Chosen(never)


def test_written_keys_are_those_of_the_file_and_the_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("parallel: {workers: 2, sp: 2}\nmodel: {settings: {hidden_size: 8}}\n", encoding="utf-8")
    keys = written_keys(str(file), ["train.steps=3"])
    assert keys == {"parallel.workers", "parallel.sp", "model.settings.hidden_size", "train.steps"}
