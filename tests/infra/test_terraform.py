"""The cloud base: Terraform's own checks and its tests against a mocked provider, without a cloud or credentials."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

MODULE = Path(__file__).resolve().parents[2] / "infra" / "terraform" / "aws"
# Where a machine without the registry may keep providers.
_MIRRORS = (
    Path("/opt/tf-plugins"),
    Path("/usr/share/terraform/plugins"),
    Path("/usr/local/share/terraform/plugins"),
    Path("~/.terraform.d/plugins").expanduser(),
)
_PROVIDER = "registry.terraform.io/hashicorp/aws/5.100.0"
_DEADLINE_S = 300.0


def terraform(folder: Path, *arguments: str) -> str:
    answer = subprocess.run(
        ["terraform", *arguments],
        cwd=folder, env=os.environ | {"CHECKPOINT_DISABLE": "1"}, capture_output=True, text=True, timeout=_DEADLINE_S,
        check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the module with its provider, or a loud skip."""
    if shutil.which("terraform") is None:
        pytest.skip("terraform is not installed: the cloud base is not validated")
    mirror = next((mirror for mirror in _MIRRORS if (mirror / _PROVIDER).is_dir()), None)
    if mirror is None:
        pytest.skip("terraform has no offline copy of the AWS provider 5.100.0: the cloud base is not validated")
    folder = tmp_path_factory.mktemp("terraform") / "aws"
    shutil.copytree(MODULE, folder)
    terraform(folder, "init", "-input=false", "-backend=false", f"-plugin-dir={mirror}")
    return folder


def test_the_module_is_formatted_and_valid(module: Path) -> None:
    terraform(module, "fmt", "-check", "-recursive")
    assert "The configuration is valid" in terraform(module, "validate", "-no-color")


def test_the_modules_own_tests_pass(module: Path) -> None:
    said = terraform(module, "test", "-no-color")
    assert "Success! 8 passed, 0 failed." in said


def test_a_module_whose_bucket_lost_its_versions_fails_its_tests(module: Path, tmp_path: Path) -> None:
    broken = tmp_path / "aws"
    shutil.copytree(module, broken, symlinks=True)
    storage = broken / "storage.tf"
    text = storage.read_text(encoding="utf-8")
    assert 'status = "Enabled"' in text
    storage.write_text(text.replace('status = "Enabled"', 'status = "Suspended"', 1), encoding="utf-8")
    with pytest.raises(AssertionError, match="the bucket is not versioned"):
        terraform(broken, "test", "-no-color")


def test_no_file_of_the_module_holds_an_account_a_key_or_a_state() -> None:
    names = {file.name for file in MODULE.rglob("*") if file.is_file()}
    assert not [name for name in names if name.endswith((".tfstate", ".tfvars", ".backup"))]
    for file in MODULE.glob("*.tf"):
        assert "AKIA" not in file.read_text(encoding="utf-8")
