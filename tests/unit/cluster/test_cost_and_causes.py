"""What a cluster costs before it exists, what must be there, and what a launcher's output comes down to."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.support.commands import stand_ins

from farspan.cluster import preflight
from farspan.cluster.certs import make_certificates
from farspan.cluster.cost import plan_cluster
from farspan.cluster.diagnose import diagnose
from farspan.cluster.environment import wheel
from farspan.cluster.preflight import check_ready, check_space
from farspan.config.cluster import ClusterSpec
from farspan.config.load import load_config
from farspan.errors import ConfigError, FarspanError, NotFoundError, StorageError

REPOSITORY = Path(__file__).resolve().parents[3]
LOCAL = ["local.head=10.9.0.1", "local.workers=[10.9.0.2]"]
FILLED = ["aws.account=123456789012", "aws.image=ami-1", "aws.subnet=subnet-1", "aws.security_group=sg-1"]


def spec(*overrides: str) -> ClusterSpec:
    return load_config(ClusterSpec, str(REPOSITORY / "infra" / "cluster.yaml"), list(overrides))


def test_the_cost_is_the_sum_of_its_nodes() -> None:
    priced = spec("head.price_per_hour=1", "cpu.price_per_hour=2", "cpu.max_nodes=3", "cpu.min_nodes=1",
                  "train.price_per_hour=50", "prefill.price_per_hour=5", "decode.price_per_hour=7",
                  "decode.max_nodes=2")  # fmt: skip
    plan = plan_cluster(priced, "aws")
    assert (plan.least, plan.most) == (1 + 2, 1 + 3 * 2 + 50 + 4 * 5 + 2 * 7)
    assert {node.node_type: node.idle_minutes for node in plan.nodes}["decode"] == 15


def test_a_sum_that_is_not_whole_is_not_shown() -> None:
    plan = plan_cluster(spec("train.price_per_hour=0"), "aws")
    assert plan.least is not None
    assert plan.most is None
    assert plan_cluster(spec(), "gcp").least is None
    assert plan_cluster(spec(), "local").most == 0.0


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("botocore.exceptions.NoCredentialsError: Unable to locate credentials", "no AWS credentials were found"),
        ("ClientError: (ExpiredToken) when calling", "have expired"),
        ("An error occurred (AuthFailure) when calling", "does not know these credentials"),
        ("(UnauthorizedOperation) You are not authorized", "may not do this"),
        ("(InvalidAMIID.NotFound) The image id '[ami-1]' does not exist", "set aws.image"),
        ("(InvalidSubnetID.NotFound)", "set aws.subnet"),
        ("(InvalidKeyPair.NotFound) The key pair 'x'", "set aws.key_name"),
        ("(InvalidParameterValue) Invalid value 'm7i.x' for InstanceType.", "no such machine; set aws of that kind"),
        ("ProfileNotFound: The config profile (x) could not be found", "no such AWS profile"),
        ("(InsufficientInstanceCapacity) We currently do not", "no such machine free"),
        ("(VcpuLimitExceeded) You have requested", "quota"),
        ("EndpointConnectionError: Could not connect", "API cannot be reached"),
        ("ubuntu@10.0.0.4: Permission denied (publickey).", "refuses the SSH key"),
        ("    SSH still not available (SSH command failed.), retrying", "does not answer SSH"),
        ("ERROR: No matching distribution found for ray==9", "does the subnet reach the package index"),
        ("OSError: [Errno 28] No space left on device", "a disk is full"),
        (
            "2026-11-26 16:37:41 INFO\nbash: ulimit: cannot modify limit\nShared connection to 10.0.0.4 closed.\n"
            "2026-11-26 16:37:47 ERR New status: \x1b[1mupdate-failed\x1b[0m\n"
            "Traceback:\nError: Failed to setup head node.",
            "a machine could not be set up: bash: ulimit: cannot modify limit",
        ),
        ("something new\n  and its last line\n", "and its last line"),
        ("", "it said nothing"),
    ],
)
def test_a_launchers_output_comes_down_to_one_sentence(output: str, said: str) -> None:
    assert said in diagnose(output)
    assert "\n" not in diagnose(output)


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with key and token, a project with wheel and lock, and AWS credentials."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for file in (".ssh/farspan.pem", ".ray/auth_token", "requirements.lock", f"dist/{wheel(spec().software)}"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("x", encoding="utf-8")
        (tmp_path / file).chmod(0o600)
    monkeypatch.setenv("PATH", str(stand_ins(tmp_path / "bin")))
    return tmp_path


def test_what_is_ready_is_let_through(ready: Path) -> None:
    check_ready(spec(*FILLED), "aws", ready, ready / "state")
    check_ready(spec(*LOCAL), "local", ready, ready / "state")


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda home, env: env.delenv("AWS_ACCESS_KEY_ID"), "AWS credentials: must be there"),
        (lambda home, env: (home / ".ssh/farspan.pem").unlink(), "aws.ssh_private_key: must be a file"),
        (lambda home, env: (home / ".ssh/farspan.pem").chmod(0o644), "run chmod 600"),
        (lambda home, env: (home / ".ray/auth_token").unlink(), "run ray get-auth-token --generate"),
        (lambda home, env: (home / ".ray/auth_token").write_text(""), "must not be empty"),
        (lambda home, env: (home / "requirements.lock").unlink(), "run it from the project's root"),
        (lambda home, env: (home / "dist" / wheel(spec().software)).unlink(), "pip wheel"),
    ],
)
def test_what_is_missing_is_one_sentence(
    break_it: object, said: str, ready: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(break_it)
    break_it(ready, monkeypatch)
    with pytest.raises(FarspanError) as refusal:
        check_ready(spec(*FILLED), "aws", ready, ready / "state")
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_region_that_is_not_one_is_answered_with_the_nearest(ready: Path) -> None:
    with pytest.raises(ConfigError, match=r"aws.region: must be a region of EC2, got 'us-eats-1'; did you mean 'us-"):
        check_ready(spec(*FILLED, "aws.region=us-eats-1", "aws.zone=us-eats-1a"), "aws", ready, ready / "state")


@pytest.mark.parametrize("field", ["account", "image", "subnet", "security_group"])
def test_ids_of_zeros_are_refused_before_the_cloud_is_asked(field: str, ready: Path) -> None:
    rest = [setting for setting in FILLED if not setting.startswith(f"aws.{field}=")]
    with pytest.raises(ConfigError, match=f"aws.{field}: must be yours"):
        check_ready(spec(*rest), "aws", ready, ready / "state")


def test_a_taken_port_on_this_machine_is_refused(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(preflight, "GCS_PORT", taken.getsockname()[1])
        with pytest.raises(ConfigError, match=r"local\.head: must have port"):
            check_ready(spec("local.head=127.0.0.1", LOCAL[1]), "local", ready, ready / "state")


@pytest.mark.parametrize(
    ("provider", "settings", "field"),
    [
        ("gcp", [], "gcp.project"),
        ("gcp", ["gcp.project=mine-123"], "gcp.image"),
        ("local", [], "local.head"),
        ("local", ["local.head=10.9.0.1"], "local.workers"),
    ],
)
def test_examples_are_refused_on_every_provider(provider: str, settings: list[str], field: str, ready: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{field}: must be yours, and this is only an example, .*; set {field} in"):
        check_ready(spec(*settings), provider, ready, ready / "state")


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda home, env: env.delenv("GOOGLE_APPLICATION_CREDENTIALS"), "Google credentials: must be there"),
        (lambda home, env: env.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/no"), "CREDENTIALS: must name a file"),
        (
            lambda home, env: env.setattr(preflight.importlib.util, "find_spec", lambda name: None),
            "google-api-python-client: must be installed here",
        ),
    ],
)
def test_what_google_cloud_needs_is_one_sentence(
    break_it: object, said: str, ready: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(break_it)
    monkeypatch.setattr(preflight, "_PRODUCT", ready / "none")
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(ready / "requirements.lock"))
    filled = spec("gcp.project=mine-123", "gcp.image=projects/mine-123/global/images/node")
    check_ready(filled, "gcp", ready, ready / "state")
    break_it(ready, monkeypatch)
    with pytest.raises(ConfigError) as refusal:
        check_ready(filled, "gcp", ready, ready / "state")
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_googles_credentials_are_looked_for_where_gcloud_keeps_them(
    ready: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "_PRODUCT", ready / "none")
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(ready / "gcloud"))
    filled = spec("gcp.project=mine-123", "gcp.image=projects/mine-123/global/images/node")
    with pytest.raises(ConfigError, match="Google credentials: must be there"):
        check_ready(filled, "gcp", ready, ready / "state")
    (ready / "gcloud").mkdir()
    (ready / "gcloud" / "application_default_credentials.json").write_text("{}", encoding="ascii")
    check_ready(filled, "gcp", ready, ready / "state")


def test_a_region_of_google_cloud_has_its_form(ready: Path) -> None:
    wrong = ["gcp.project=mine-123", "gcp.image=projects/mine-123/global/images/node", "gcp.region=us-east-1"]
    with pytest.raises(ConfigError, match=r"gcp\.region: must be a region of Compute Engine, got 'us-east-1'"):
        check_ready(spec(*wrong, "gcp.zone=us-east-1-a"), "gcp", ready, ready / "state")


def test_certificates_that_nodes_would_refuse_are_refused_before_a_node_is_started(ready: Path) -> None:
    known = [*LOCAL, f"tls_folder={ready}/tls"]
    with pytest.raises(ConfigError, match=r"tls_folder: must hold ca.crt, node.crt, node.key, got 'no ca.crt in "):
        check_ready(spec(*known), "local", ready, ready / "state")
    make_certificates(ready / "tls", ["10.9.0.1"], 30)
    with pytest.raises(ConfigError, match=r"with every node's address, got '10.9.0.2'; run farspan infra certs"):
        check_ready(spec(*known), "local", ready, ready / "state")
    make_certificates(ready / "tls", ["10.9.0.0/28"], 30)
    check_ready(spec(*known), "local", ready, ready / "state")
    # A cloud gives addresses later.
    check_ready(spec(*FILLED, known[-1]), "aws", ready, ready / "state")
    make_certificates(ready / "tls", ["10.9.0.0/29", "10.9.1.1", "127.0.0.0/28"], 30)
    with pytest.raises(ConfigError, match=r"of the network that .*, got '9 addresses'; run .*/tls --host NETWORK"):
        check_ready(spec(*FILLED, known[-1]), "aws", ready, ready / "state")
    (ready / "tls" / "node.key").chmod(0o644)
    with pytest.raises(ConfigError, match=r"tls_folder: must be readable by you alone"):
        check_ready(spec(*known), "local", ready, ready / "state")


def test_names_are_looked_up_as_ray_does_and_certificates_hold_what_is_found(
    ready: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"10.9.0.1": "10.9.0.1", "worker.example": "10.9.0.2"}
    monkeypatch.setattr(preflight, "socket", SimpleNamespace(**vars(socket) | {"gethostbyname": known.__getitem__}))
    named = ["local.head=10.9.0.1", "local.workers=[worker.example]", f"tls_folder={ready}/tls"]
    make_certificates(ready / "tls", ["10.9.0.1", "worker.example"], 30)
    with pytest.raises(ConfigError, match=r"with every node's address, got '10\.9\.0\.2 \(worker\.example\)'"):
        check_ready(spec(*named), "local", ready, ready / "state")
    make_certificates(ready / "tls", ["10.9.0.1", "10.9.0.2"], 30)
    check_ready(spec(*named), "local", ready, ready / "state")


@pytest.mark.parametrize("host", ["no.such.invalid", "a..b", "fd00::1"])
def test_a_machine_that_cannot_be_looked_up_is_one_sentence(host: str, ready: Path) -> None:
    with pytest.raises(ConfigError, match=rf"local\.workers: must be IPv4 addresses, or names that .*, got '{host}'; "):
        check_ready(spec(LOCAL[0], f"local.workers=['{host}']"), "local", ready, ready / "state")


@pytest.mark.parametrize("command", ["ssh", "rsync"])
def test_commands_that_reach_nodes_must_be_there(command: str, ready: Path) -> None:
    (ready / "bin" / command).unlink()
    with pytest.raises(ConfigError, match=rf"{command}: must be installed here: .*; run apt-get install "):
        check_ready(spec(*FILLED), "aws", ready, ready / "state")


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_LEAST_FREE_BYTES", 1 << 60)
    with pytest.raises(StorageError, match="MiB are free"):
        check_space(tmp_path / "not" / "yet")


def test_a_missing_wheel_is_not_found(ready: Path) -> None:
    (ready / "dist" / wheel(spec().software)).unlink()
    with pytest.raises(NotFoundError):
        check_ready(spec(*LOCAL), "local", ready, ready / "state")
