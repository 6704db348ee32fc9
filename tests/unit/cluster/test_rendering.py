"""One spec, many files: what is committed is what it renders, and nothing secret gets in."""

import re
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import HTTPOptionsSchema, ServeDeploySchema
from tests.support.disk import small_disk

from farspan.cluster.check_launcher import launcher_problems
from farspan.cluster.environment import HABITS
from farspan.cluster.examples import examples_in
from farspan.cluster.launcher import render_launcher
from farspan.cluster.rayclusters import serve_config, training_config
from farspan.cluster.secrets import holds_secret
from farspan.cluster.tree import render_tree, stale_files, write_tree
from farspan.config.check import check_run
from farspan.config.cluster import ClusterSpec
from farspan.config.cluster_rules import check_cluster
from farspan.config.load import config_of, load_config, parse_config
from farspan.config.schema import RunConfig, ServeConfig
from farspan.config.serve_rules import check_serve
from farspan.errors import ConfigError, NotFoundError, StorageError
from farspan.serve.app import APP_NAME
from farspan.serve.lineup import line_up
from farspan.serve.scaling import declared

__all__ = ["small_disk"]

REPOSITORY = Path(__file__).resolve().parents[3]
SPEC = str(REPOSITORY / "infra" / "cluster.yaml")


def spec(*overrides: str) -> ClusterSpec:
    loaded = load_config(ClusterSpec, SPEC, list(overrides))
    check_cluster(loaded)
    return loaded


def test_the_committed_files_are_what_the_committed_spec_renders() -> None:
    assert stale_files(FILES, REPOSITORY) == []


def test_a_changed_a_missing_and_a_stray_file_are_noticed(tmp_path: Path) -> None:
    files = FILES
    assert len(write_tree(files, tmp_path)) == len(files)
    assert write_tree(files, tmp_path) == []
    (tmp_path / "ray_cluster.yaml").write_text("changed", encoding="utf-8")
    (tmp_path / "infra/clusters/gcp.yaml").unlink()
    (tmp_path / "infra/k8s/base/common/stray.yaml").write_text("a: 1", encoding="utf-8")
    wrong = ["infra/clusters/gcp.yaml", "infra/k8s/base/common/stray.yaml", "ray_cluster.yaml"]
    assert stale_files(files, tmp_path) == wrong


FILES = render_tree(spec())


@pytest.mark.parametrize("path", sorted(FILES))
def test_a_rendered_file_is_yaml_without_a_secret_and_without_the_newest_of_anything(path: str) -> None:
    text = FILES[path]
    documents = list(yaml.safe_load_all(text))
    assert all(isinstance(document, dict) for document in documents)
    assert not holds_secret(documents)
    assert re.search(r":latest\b|nightly/|@main\b", text) is None
    # A path of a patch cannot be broken.
    assert [line for line in text.splitlines() if len(line) > 120 and " path: /" not in line] == []


def test_a_canary_in_the_places_of_secrets_never_reaches_a_rendered_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = "canary-4f1d9c"
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text(canary, encoding="utf-8")
    monkeypatch.setenv("HOME", str(home))
    for name in ("RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        monkeypatch.setenv(name, canary)
    assert [path for path, text in render_tree(spec()).items() if canary in text] == []


def test_settings_reach_the_files() -> None:
    files = render_tree(spec("name=mine", "decode.max_nodes=7", "decode.spot=true", "aws.image=ami-12345678"))
    launcher = yaml.safe_load(files["ray_cluster.yaml"])
    decode = launcher["available_node_types"]["decode"]
    assert (launcher["cluster_name"], launcher["max_workers"], decode["max_workers"]) == ("mine", 16, 7)
    assert decode["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert "InstanceMarketOptions" not in launcher["available_node_types"]["prefill"]["node_config"]
    assert decode["node_config"]["ImageId"] == "ami-12345678"
    service = yaml.safe_load(files["infra/k8s/base/serve/rayservice.yaml"])
    groups = {g["groupName"]: g["maxReplicas"] for g in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    assert groups == {"prefill": 4, "decode": 7}


def test_no_worker_is_to_its_cloud_who_the_head_is() -> None:
    files = render_tree(spec("aws.worker_instance_profile=plain", "gcp.worker_service_account=plain-worker"))
    for path, key, head, worker in (
        ("ray_cluster.yaml", "IamInstanceProfile", "instance-profile/farspan-head", "instance-profile/plain"),
        ("infra/clusters/gcp.yaml", "serviceAccounts", "farspan-head@your", "plain-worker@your"),
    ):
        types = yaml.safe_load(files[path])["available_node_types"]
        given = {name: str(node["node_config"][key]) for name, node in types.items()}
        assert head in given.pop("head")
        assert len(given) == 4
        assert all(worker in account and head not in account for account in given.values())


def test_the_job_and_the_service_read_configs_that_farspan_takes() -> None:
    run = parse_config(RunConfig, training_config(spec())["data"]["run.yaml"])
    check_run(run)
    assert run.parallel.workers == 8
    (application,) = serve_config(spec())["applications"]
    check_serve(config_of(ServeConfig, application["args"]))


def test_the_service_answers_where_kuberay_probes_it_and_keeps_the_timeouts_of_its_config() -> None:
    config = serve_config(spec())
    read = ServeDeploySchema.model_validate(config)
    # Its readiness probe of every worker pod asks the proxy of that pod.
    assert read.proxy_location.value == "EveryNode"
    wanted = config_of(ServeConfig, config["applications"][0]["args"]).proxy_timeout_s
    assert (read.http_options.request_timeout_s, read.http_options.keep_alive_timeout_s) == (wanted, 75)
    assert set(config["http_options"]) <= set(HTTPOptionsSchema.model_fields)


def test_the_service_scales_by_the_policy_that_farspan_serve_declares() -> None:
    (application,) = serve_config(spec())["applications"]
    config = config_of(ServeConfig, application["args"])
    (wanted,) = declared(line_up([config]), APP_NAME, str(config.api_key_file)).applications
    for key in ("name", "route_prefix", "import_path", "autoscaling_policy"):
        assert application[key] == getattr(wanted, key)
    assert config_of(ServeConfig, wanted.args) == config


def test_roles_of_a_service_have_as_many_workers_as_their_groups_have_gpus() -> None:
    sizes = ("prefill.gpus=8", "prefill.min_nodes=1", "prefill.max_nodes=2", "decode.min_nodes=3", "decode.max_nodes=3")
    (application,) = serve_config(spec(*sizes))["applications"]
    prefill, decode = application["args"]["prefill"], application["args"]["decode"]
    assert (prefill["min_replicas"], prefill["replicas"], prefill["max_replicas"]) == (8, 8, 16)
    assert (decode["min_replicas"], decode["replicas"], decode["max_replicas"]) == (3, 3, 3)
    # 16 CPUs of a node, of which 14 are a pod's.
    assert (prefill["cpus"], decode["cpus"]) == (1.75, 4.0)
    (fixed,) = serve_config(spec("prefill.max_nodes=1", "prefill.min_nodes=1", *sizes[3:]))["applications"]
    assert "autoscaling_policy" not in fixed


def test_a_budget_lets_one_of_several_workers_go_and_holds_no_lonely_one() -> None:
    def budgets(*overrides: str) -> dict[str, int]:
        text = render_tree(spec(*overrides))["infra/k8s/base/serve/disruption.yaml"]
        return {b["metadata"]["name"]: b["spec"]["minAvailable"] for b in yaml.safe_load_all(text)}

    assert budgets("prefill.min_nodes=1") == {"farspan-serve-head": 1}
    assert budgets("decode.min_nodes=2", "prefill.min_nodes=4") == {"farspan-serve-head": 1, "prefill": 3, "decode": 1}


def test_a_budget_of_heads_is_of_one_cluster_alone() -> None:
    for part, name, kind in (("cluster", "farspan", "raycluster"), ("train", "farspan-train", "rayjob")):
        (wanted,) = yaml.safe_load_all(FILES[f"infra/k8s/base/{part}/disruption.yaml"])
        labels = wanted["spec"]["selector"]["matchLabels"]
        assert labels == {"farspan-cluster": name, "ray.io/node-type": "head"}
        assert f"farspan-cluster: {name}\n" in FILES[f"infra/k8s/base/{part}/{kind}.yaml"]


def test_what_only_shows_an_example_is_told_from_what_a_user_gave() -> None:
    def told(*overrides: str) -> set[str]:
        files = render_tree(spec(*overrides))
        return set(examples_in([d for path in files if "k8s" in path for d in yaml.safe_load_all(files[path])]))

    fields = {f"kubernetes.{name}" for name in ("image", "cpu_image", "model", "corpus", "runs")}
    assert told() == fields
    assert told("kubernetes.image=ghcr.io/a/farspan:1", "kubernetes.runs=s3://mine/") == fields - {
        "kubernetes.image",
        "kubernetes.runs",
    }


def test_the_job_reads_and_writes_where_the_spec_says() -> None:
    given = spec("kubernetes.model=s3://b/m", "kubernetes.corpus=s3://b/c", "kubernetes.runs=s3://b/r/", "name=mine")
    run = parse_config(RunConfig, training_config(given)["data"]["run.yaml"])
    assert (run.model.source, run.data.corpus, run.output) == ("s3://b/m", "s3://b/c", "s3://b/r/mine-train")


def test_the_head_and_the_job_that_clears_redis_reach_it_and_workers_do_not() -> None:
    policy = yaml.safe_load(FILES["infra/k8s/components/gcs-ft-redis/network.yaml"])
    (wanted,) = policy["spec"]["podSelector"]["matchExpressions"]
    assert (wanted["key"], wanted["operator"]) == ("ray.io/node-type", "In")
    assert wanted["values"] == ["head", "redis-cleanup"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("prefil.max_nodes=2", "prefil: is not a known key, got {'max_nodes': 2}; did you mean 'prefill'?"),
        ("aws.regoin=us-east-1", "aws.regoin: is not a known key, got 'us-east-1'; did you mean 'region'?"),
        ("name=Far_Span", "name: must be 1 to 40 of a-z"),
        ("head.cpus=8", "head: must offer no CPU and no GPU"),
        ("head.spot=true", "head.spot: must be false"),
        ("cpu.max_nodes=0", "cpu.max_nodes: must not be less than 1"),
        ("cpu.min_nodes=9", "cpu.max_nodes: must not be less than 1 or min_nodes"),
        ("train.idle_minutes=0", "train.idle_minutes: must lie in 1..60"),
        ("train.price_per_hour=-1", "train.price_per_hour: must be at least 0"),
        ("software.ray='>=2.60'", "software.ray: must be one exact version"),
        ("aws.region=eu-west-1", "aws.zone: must be a zone of aws.region=eu-west-1, got 'us-east-1a'; use aws.zone="),
        ("local.workers=[192.0.2.10]", "local.workers: must name each machine once"),
        ("kubernetes.image=registry/farspan:latest", "kubernetes.image: must name a fixed tag"),
        ("kubernetes.image=registry:5000/farspan", "kubernetes.image: must name a fixed tag"),
        ("up_timeout_s=0", "up_timeout_s: must be above 0"),
        (
            "aws.zone=us-east-12a",
            "aws.zone: must be a zone of aws.region=us-east-1, got 'us-east-12a'; use aws.zone=us",
        ),
        ("gcp.zone=us-central1", "gcp.zone: must be a zone of gcp.region=us-central1, got 'us-central1'; use gcp.zone"),
        ("gcp.project=My Project", "gcp.project: must be the id of a project"),
        ("tls_folder=my tls", "tls_folder: must be a folder, of plain letters, got 'my tls'"),
        ("aws.worker_instance_profile=farspan-head", "aws.worker_instance_profile: must not be aws.instance_profile"),
        ("gcp.service_account=farspan-worker", "gcp.worker_service_account: must not be gcp.service_account, the head"),
        ("aws.instance_profile=arn:aws:iam::1:instance-profile/x", "must be the name of an instance profile, not its"),
        ("gcp.worker_service_account=a@p.iam.gserviceaccount.com", "must be the id of a service account, without @"),
    ],
)
def test_a_wrong_spec_is_refused_in_one_sentence(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        spec(override)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("provider", "override", "written"),
    [
        ("aws", "aws.zone=us-east-1-wl1-bos-wlz-1", "availability_zone: us-east-1-wl1-bos-wlz-1 "),
        ("aws", "aws.image=resolve:ssm:/nodes/newest:3", "ImageId: resolve:ssm:/nodes/newest:3 "),
        ("gcp", "gcp.zone=us-central1-ai1a", "availability_zone: us-central1-ai1a\n"),
        ("gcp", "gcp.project=example.com:my-proj", "farspan-worker@my-proj.example.com.iam.gserviceaccount.com\n"),
        ("local", "local.workers=[gpu_1]", "gpu_1"),
    ],
)
def test_rare_names_of_clouds_and_machines_are_legal(provider: str, override: str, written: str) -> None:
    text = render_launcher(spec(override), provider)
    assert written in text
    assert launcher_problems(yaml.safe_load(text), spec().software) == []


def test_a_full_disk_and_a_missing_folder_are_one_sentence(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"x" * (124 << 10))
    with pytest.raises(StorageError, match="No space left on device; free space"):
        write_tree(render_tree(spec()), small_disk)
    with pytest.raises(NotFoundError, match="no such folder"):
        write_tree({}, small_disk / "gone")


def test_nothing_we_set_opens_ports_of_serves_replicas_beside_its_proxys() -> None:
    switches = ("RAY_SERVE_ENABLE_DIRECT_INGRESS", "RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED")
    image = (REPOSITORY / "infra" / "docker" / "Dockerfile").read_text(encoding="utf-8")
    texts = {**FILES, "habits": " ".join(HABITS), "image": image}
    assert all("RAY_SERVE_PROXY_USE_GRPC" in texts[name] for name in ("ray_cluster.yaml", "habits", "image"))
    assert [name for name, text in texts.items() if any(switch in text for switch in switches)] == []
