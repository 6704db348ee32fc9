"""The cloud base: Terraform's own checks and its tests against a mocked provider, without a cloud or credentials."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MODULE = REPOSITORY / "infra" / "terraform" / "aws"
# Where a machine without the registry may keep providers: this checkout's cache, and Terraform's own places.
_MIRRORS = (
    REPOSITORY / ".cache" / "terraform",
    Path("~/.terraform.d/plugins").expanduser(),
    Path("/usr/local/share/terraform/plugins"),
    Path("/usr/share/terraform/plugins"),
    Path("/opt/tf-plugins"),
)
_PROVIDER = "registry.terraform.io/hashicorp/aws"
# As a folder, or packed as `terraform providers mirror` leaves it.
_VERSIONS = ("5.100.0/*", "terraform-provider-aws_5.100.0_*.zip")
_DEADLINE_S = 300.0


def terraform(folder: Path, *arguments: str) -> str:
    answer = subprocess.run(
        ["terraform", *arguments],
        cwd=folder, env=os.environ | {"CHECKPOINT_DISABLE": "1"}, capture_output=True, text=True, timeout=_DEADLINE_S,
        check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def holds_provider(mirror: Path) -> bool:
    return any(found for version in _VERSIONS for found in (mirror / _PROVIDER).glob(version))


def plugin_folder() -> Path:
    """Where the provider lies, or a loud skip."""
    if shutil.which("terraform") is None:
        pytest.skip("terraform is not installed: the cloud base is not validated")
    mirror = next((mirror for mirror in _MIRRORS if holds_provider(mirror)), None)
    if mirror is None:
        pytest.skip(
            "the AWS provider 5.100.0 is neither in .cache/terraform nor in Terraform's own folders (infra/README.md): "
            "the cloud base is not validated"
        )
    return mirror


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the module with its provider."""
    mirror = plugin_folder()
    folder = tmp_path_factory.mktemp("terraform") / "aws"
    shutil.copytree(MODULE, folder)
    terraform(folder, "init", "-input=false", "-backend=false", f"-plugin-dir={mirror}")
    return folder


def test_the_module_is_formatted_and_valid(module: Path) -> None:
    terraform(module, "fmt", "-check", "-recursive")
    assert "The configuration is valid" in terraform(module, "validate", "-no-color")


@pytest.mark.soak
def test_the_modules_own_tests_pass(module: Path) -> None:
    said = terraform(module, "test", "-no-color")
    assert "Success! 12 passed, 0 failed." in said


@pytest.mark.soak
def test_a_module_whose_bucket_lost_its_versions_fails_its_tests(module: Path, tmp_path: Path) -> None:
    broken = tmp_path / "aws"
    shutil.copytree(module, broken, symlinks=True)
    storage = broken / "storage.tf"
    text = storage.read_text(encoding="utf-8")
    assert 'status = "Enabled"' in text
    storage.write_text(text.replace('status = "Enabled"', 'status = "Suspended"', 1), encoding="utf-8")
    with pytest.raises(AssertionError, match="the bucket is not versioned"):
        terraform(broken, "test", "-no-color")


def test_every_add_on_says_what_happens_to_one_that_is_there() -> None:
    text = (MODULE / "eks.tf").read_text(encoding="utf-8")
    addons = re.findall(r'^resource "aws_eks_addon" "(\w+)" \{\n(.*?)^\}', text, re.MULTILINE | re.DOTALL)
    assert {name for name, _ in addons} == {"network", "others", "volumes"}
    for _, body in addons:
        assert dict(re.findall(r'resolve_conflicts_on_(\w+) = "(\w+)"', body)) == {
            "create": "OVERWRITE",
            "update": "PRESERVE",
        }


def test_no_file_of_the_module_holds_an_account_a_key_or_a_state() -> None:
    names = {file.name for file in MODULE.rglob("*") if file.is_file()}
    assert not [name for name in names if name.endswith((".tfstate", ".tfvars", ".backup"))]
    for file in MODULE.glob("*.tf"):
        assert "AKIA" not in file.read_text(encoding="utf-8")
