"""What cannot be served is refused in one sentence, before Ray starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ray
from tests.unit.serve.tiny_folder import write_tiny_model

from farspan.config.load import load_config
from farspan.config.schema import EngineConfig, ServeConfig
from farspan.errors import CheckpointError, ConfigError, ModelError
from farspan.serve.app import check_app, model_name, run_app
from farspan.serve.folder import open_model_folder
from farspan.serve.worker import worker_threads


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("served") / "tiny"
    write_tiny_model(made)
    return made


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "tokenizer.json", "everything"])
def test_an_incomplete_model_folder_is_refused_before_ray_starts(folder, tmp_path, missing):
    given = tmp_path / "model"
    if missing != "everything":
        given.mkdir()
        for file in folder.iterdir():
            if file.name != missing:
                (given / file.name).symlink_to(file)
    with pytest.raises(CheckpointError) as refused, run_app(ServeConfig(model=str(given), port=1)):
        raise AssertionError("it must not start")
    assert len(str(refused.value).splitlines()) == 1
    assert not ray.is_initialized()


def test_a_host_beyond_this_machine_without_keys_is_refused_before_ray_starts(folder):
    config = ServeConfig(model=str(folder), host="0.0.0.0")
    with pytest.raises(ConfigError, match="api_key_file"), run_app(config):
        raise AssertionError("it must not start")
    assert not ray.is_initialized()


def test_a_model_the_engine_cannot_run_is_refused_before_ray_starts(folder, tmp_path):
    for file in folder.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="rope_type dynamic"), run_app(ServeConfig(model=str(tmp_path))):
        raise AssertionError("it must not start")
    assert not ray.is_initialized()


def test_a_complete_folder_is_opened_where_it_lies(folder):
    assert open_model_folder(str(folder)) == folder
    assert check_app(ServeConfig(model=str(folder))) == folder


def test_the_example_config_is_legal_but_for_the_model_it_leaves_open(folder):
    config = load_config(ServeConfig, "serve/configs/local.yaml", [f"model={folder}"])
    assert check_app(config) == folder
    assert model_name(config) == "tiny"
    with pytest.raises(ConfigError, match="model"):
        load_config(ServeConfig, "serve/configs/local.yaml", [])


@pytest.mark.parametrize(("cpus", "given", "expected"), [(2, 0, 1), (1, 0, 1), (9, 0, 4), (2, 3, 3)])
def test_workers_share_the_cores_of_the_machine(cpus, given, expected):
    config = ServeConfig(model="m", engine=EngineConfig(threads=given))
    assert worker_threads(config, cpus) == expected
