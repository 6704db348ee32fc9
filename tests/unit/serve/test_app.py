"""What cannot be served is refused in one sentence, before Ray starts."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from pathlib import Path

import pytest
import ray
from ray.exceptions import RayError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError
from tests.unit.serve.tiny_folder import write_tiny_model

from farspan.config.load import config_of, load_config
from farspan.config.schema import EngineConfig, RoleConfig, ServeConfig
from farspan.config.serve_rules import check_serve
from farspan.engine.request import SamplingParams
from farspan.errors import CheckpointError, ClusterError, ConfigError, ModelError
from farspan.models.folder import open_model_folder
from farspan.serve import app
from farspan.serve.app import Running, check_app, num_cpus, run_app, update_app
from farspan.serve.lineup import line_up, model_name
from farspan.serve.messages import Failed, GenerationRequest, WorkerInfo
from farspan.serve.ranks import rank_options
from farspan.serve.scaling import declared, is_scaled, replicas_of
from farspan.serve.worker import refusal, worker_threads


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
    config = ServeConfig(model=str(folder), host="0.0.0.0", port=free_port())
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
    assert check_app(ServeConfig(model=str(folder), port=free_port())) == folder


def test_the_example_config_is_legal_but_for_the_model_it_leaves_open(folder):
    config = load_config(ServeConfig, "serve/configs/local.yaml", [f"model={folder}", f"port={free_port()}"])
    assert check_app(config) == folder
    assert model_name(config) == "tiny"
    with pytest.raises(ConfigError, match="model"):
        load_config(ServeConfig, "serve/configs/local.yaml", [])


@pytest.mark.parametrize(("cpus", "given", "expected"), [(2, 0, 1), (1, 0, 1), (9, 0, 4), (2, 3, 3)])
def test_workers_share_the_cores_of_the_machine(cpus, given, expected):
    config = ServeConfig(model="m", engine=EngineConfig(threads=given))
    assert worker_threads(config, cpus) == expected


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_port_in_use_is_refused_in_one_sentence_before_ray_starts(folder, host):
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as refused:
            check_app(ServeConfig(model=str(folder), host=host, port=port))
    assert str(refused.value) == f"port: must be free on this machine, got {port}; use port=<a free one>"
    assert not ray.is_initialized()


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_a_host_that_is_not_this_machine_is_refused_before_ray_starts(folder, host):
    with pytest.raises(ConfigError, match="host: must be an address of this machine"):
        check_app(ServeConfig(model=str(folder), host=host, port=free_port()))


@pytest.mark.parametrize("problem", [RuntimeError("a\nlong\ntraceback: it broke"), ValueError("it broke")])
def test_serve_that_cannot_start_is_one_sentence(folder, tmp_path, monkeypatch, problem):
    def broken(**_):
        raise problem

    stopped = []
    monkeypatch.setattr(app.serve, "start", broken)
    monkeypatch.setattr(app.serve, "shutdown", lambda: stopped.append(True))
    monkeypatch.setattr(app, "_status", lambda: "")
    monkeypatch.setenv("HOME", str(tmp_path))
    config = ServeConfig(model=str(folder), port=free_port())
    with pytest.raises(ClusterError, match=r"could not start.*it broke") as refused, run_app(config):
        raise AssertionError("it must not start")
    assert len(str(refused.value).splitlines()) == 1
    assert stopped


@pytest.mark.parametrize(("before", "now"), [("proxy", "ingress"), ("ingress", "proxy")])
def test_who_listens_stays_what_it_was_while_a_server_runs(folder, tmp_path, before, now):
    keys = tmp_path / "keys"
    keys.touch(mode=0o600)
    keys.write_text("sk-test\n")
    config = ServeConfig(model=str(folder), api_key_file=str(keys), listener=now)
    running = Running(f"http://{config.host}:{config.port}/v1", "tiny", str(keys), "", before)
    with pytest.raises(ConfigError, match="listener: stays what it was while a server runs"):
        update_app(running, config)
    assert not ray.is_initialized()


def test_an_ingress_listens_itself_on_one_machine_only(folder, tmp_path, monkeypatch):
    keys = tmp_path / "keys"
    keys.touch(mode=0o600)
    keys.write_text("sk-test\n")
    nodes = [{"Alive": True}, {"Alive": False}, {"Alive": True}]
    monkeypatch.setattr(app.ray, "nodes", lambda: nodes)
    config = ServeConfig(model=str(folder), port=free_port(), api_key_file=str(keys), listener="ingress")
    with pytest.raises(ConfigError, match=r"listener: must be proxy .*\(2 here\)"), run_app(config):
        raise AssertionError("it must not start")


def test_the_wait_for_a_server_on_this_machine_takes_no_proxy(monkeypatch):
    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            return

    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), Ready) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            app._wait_ready(f"http://127.0.0.1:{server.server_port}", time.monotonic() + 20, 20)
        finally:
            server.shutdown()
            thread.join(timeout=30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("decode.replicas=0", "decode.replicas: must be at least 1, got 0; use decode.replicas=1"),
        ("decode.min_replicas=2", "decode.min_replicas: must lie in 0..1, got 2; use decode.min_replicas=1"),
        ("decode.max_replicas=0", "decode.max_replicas: must be at least 1, got 0; use decode.max_replicas=1"),
        ("objectives.token_s=0", "objectives.token_s: must be more than 0, got 0.0; use for example"),
        ("objectives.max_wait_s=0", "objectives.max_wait_s: must be more than 0, got 0.0; use for example"),
        ("scaling.down_s=-1", "scaling.down_s: must lie in 0..inf, got -1.0; use scaling.down_s=0"),
        ("drain_s=-1", "drain_s: must lie in 0..inf, got -1.0; use drain_s=0"),
        ("listener=ingres", "listener: must be one of proxy, ingress, got 'ingres'; did you mean 'ingress'?"),
        ("stream_interval_s=2", "stream_interval_s: must lie in 0..1, got 2.0; use stream_interval_s=1"),
        ("transfer.split=allways", "transfer.split: must be one of predicted, always, got 'allways'"),
        ("engine.tensor_parallel=0", "engine.tensor_parallel: must be at least 1, got 0; use engine.tensor_parallel=1"),
    ],
)
def test_sizes_and_objectives_that_make_no_sense_are_refused_with_the_nearest_legal_value(setting, said):
    with pytest.raises(ConfigError) as refused:
        check_serve(load_config(ServeConfig, "serve/configs/local.yaml", ["model=m", setting]))
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("engine.offload_bytes=9", "engine.offload_bytes: does not go with engine.tensor_parallel=2: each rank has"),
        ("engine.host_cache_bytes=9", "engine.host_cache_bytes: does not go with engine.tensor_parallel=2: each rank"),
        ("engine.adapters={a: b}", "engine.adapters: does not go with engine.tensor_parallel=2: adapters are not cut"),
    ],
)
def test_what_several_ranks_do_not_do_is_refused_before_anything_starts(setting, said):
    legal = ["model=m", "engine.tensor_parallel=2"]
    check_serve(load_config(ServeConfig, "serve/configs/local.yaml", legal))
    with pytest.raises(ConfigError) as refused:
        check_serve(load_config(ServeConfig, "serve/configs/local.yaml", [*legal, setting]))
    assert str(refused.value).startswith(said)
    assert "engine.tensor_parallel=1" in str(refused.value)


def test_a_degree_that_the_model_cannot_be_cut_by_is_refused_before_ray_starts(folder):
    config = ServeConfig(model=str(folder), port=free_port(), engine=EngineConfig(tensor_parallel=3))
    with pytest.raises(ConfigError, match=r"engine.tensor_parallel: must divide the 4 heads"), run_app(config):
        raise AssertionError("it must not start")
    assert not ray.is_initialized()
    config.engine.tensor_parallel = 2
    check_app(config)


def test_each_rank_of_a_worker_has_a_bundle_on_one_machine_and_the_first_what_makes_it_one_worker():
    config = ServeConfig(model="m", decode=RoleConfig(cpus=2, gpus=1, custom={"farspan-decode": 1}))
    assert rank_options(config.decode, config) == {}
    config.engine.tensor_parallel = 3
    rest = {"CPU": 2, "GPU": 1}
    assert rank_options(config.decode, config) == {
        "placement_group_bundles": [{**rest, "farspan-decode": 1}, rest, rest],
        "placement_group_strategy": "STRICT_PACK",
    }
    assert rank_options(config.prefill, config)["placement_group_bundles"] == [{"CPU": 0.5}] * 3
    assert num_cpus(config) == 7.5


def test_an_application_whose_size_may_change_is_declared_as_a_config_file_would_be():
    fixed = ServeConfig(model="m")
    assert not is_scaled(fixed)
    assert replicas_of(fixed.decode, fixed) == {"num_replicas": 1}
    nobody = RoleConfig(replicas=0, min_replicas=0, max_replicas=4)
    open_ended = ServeConfig(model="m", prefill=nobody)
    check_serve(open_ended)
    assert is_scaled(open_ended)
    ranges = [replicas_of(role, open_ended)["autoscaling_config"] for role in (nobody, open_ended.decode)]
    assert [(r.min_replicas, r.initial_replicas, r.max_replicas) for r in ranges] == [(0, 0, 4), (1, 1, 1)]
    (application,) = declared(line_up([open_ended]), "farspan", "/keys").applications
    assert application.autoscaling_policy["policy_function"] == "farspan.serve.sizing:Sizing"
    # What is built from it is what was asked for.
    built = config_of(ServeConfig, application.args)
    assert (built.prefill, built.api_key_file) == (nobody, "/keys")


def test_an_endpoint_that_begins_without_workers_is_legal_and_has_room_for_one_of_each():
    nobody = RoleConfig(replicas=0, min_replicas=0)
    config = ServeConfig(model="m", prefill=nobody, decode=nobody)
    check_serve(config)
    assert is_scaled(config)
    ranges = [replicas_of(role, config)["autoscaling_config"] for role in (config.prefill, config.decode)]
    assert [(r.min_replicas, r.initial_replicas, r.max_replicas) for r in ranges] == [(0, 0, 1)] * 2
    assert num_cpus(config) == 1.0
    assert worker_threads(config, 8) == 4


@pytest.mark.parametrize("there", [True, False])
def test_the_transport_is_told_without_starting_a_worker(monkeypatch, there):
    info = WorkerInfo("decode", 1, "layout", 97, 512, 400, 9, 9, 0, 0, 0, transport="nixl", transport_reason="it works")

    class Asked:
        """A deployment that may only be asked in a way that starts nobody."""

        def broadcast(self, method):
            assert method == "info"
            return self

        def results(self, **_):
            if not there:
                raise DeploymentUnavailableError(DeploymentID("decode"))
            return [RayError("gone"), info]

    monkeypatch.setattr(app, "handle_for_threads", lambda _: Asked())
    (place,) = line_up([ServeConfig(model="m")])
    said = app._told_transport(place)
    assert said == ("nixl (it works)" if there else "transfer.transport=auto, no worker runs that says more")


def test_a_worker_answers_only_with_the_checkpoint_that_an_answer_began_with():
    def asked(weights: str) -> Failed | None:
        return refusal(GenerationRequest("r", (1, 2), SamplingParams(), weights=weights), "new")

    assert asked("") is None
    assert asked("new") is None
    refused = asked("old")
    assert isinstance(refused.error, ClusterError)
