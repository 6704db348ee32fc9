"""The cloud base, applied to a mocked AWS (moto) and asked for by another client: what is there is what was promised.

moto knows no EKS add-ons and no pod identities; what stands on them is left out and is only planned elsewhere.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from moto.core.config import default_user_config
from tests.infra.test_terraform import MODULE, plugin_folder
from tests.support.cloud import KEYS, api

_DEADLINE_S = 500.0
# The provider takes its endpoint from the environment; a bucket's name must not become part of a host's name.
_MOCKED = """
provider "aws" {
  s3_use_path_style           = true
  skip_metadata_api_check     = true
  skip_region_validation      = true
  skip_requesting_account_id  = false
}
"""
_UNKNOWN = ("aws_eks_addon", "aws_eks_pod_identity_association")


@dataclass(frozen=True)
class Applied:
    folder: Path
    endpoint: str

    def terraform(self, *words: str) -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TF_"))}
        answer = subprocess.run(
            ["terraform", *words, "-no-color"], cwd=self.folder,
            env=environment | KEYS | {"AWS_ENDPOINT_URL": self.endpoint, "CHECKPOINT_DISABLE": "1"},
            capture_output=True, text=True, timeout=_DEADLINE_S, check=False,
        )  # fmt: skip
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout

    def client(self, service: str) -> Any:
        return botocore.session.Session().create_client(
            service,
            endpoint_url=self.endpoint,
            region_name=KEYS["AWS_DEFAULT_REGION"],
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        )

    def output(self, name: str) -> Any:
        return json.loads(self.terraform("output", "-json"))[name]["value"]


@pytest.fixture
def mocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Applied]:
    """The module without what the mocked cloud does not know, initialised."""
    plugins = plugin_folder()
    # AWS's own policies, which roles are given.
    monkeypatch.setitem(default_user_config["iam"], "load_aws_managed_policies", True)
    folder = tmp_path / "aws"
    shutil.copytree(MODULE, folder, ignore=shutil.ignore_patterns("tests"))
    (folder / "override.tf").write_text(_MOCKED, encoding="utf-8")
    for file in folder.glob("*.tf"):
        file.write_text(without(file.read_text(encoding="utf-8")), encoding="utf-8")
    with api("127.0.0.1") as endpoint:
        found = Applied(folder, endpoint)
        found.terraform("init", "-input=false", "-backend=false", f"-plugin-dir={plugins}")
        yield found


def without(text: str) -> str:
    """A module's text without the resources the mocked cloud does not know; each begins and ends at a line's start."""
    kept, skipping = [], False
    for line in text.splitlines(keepends=True):
        skipping = skipping or any(line.startswith(f'resource "{name}"') for name in _UNKNOWN)
        if not skipping:
            kept.append(line)
        skipping = skipping and not line.startswith("}")
    return "".join(kept)


@pytest.mark.soak
def test_the_cloud_base_is_there_after_apply_and_gone_after_destroy(mocked: Applied) -> None:
    ec2, s3, eks, iam = (mocked.client(service) for service in ("ec2", "s3", "eks", "iam"))
    before = {vpc["VpcId"] for vpc in ec2.describe_vpcs()["Vpcs"]}
    mocked.terraform("apply", "-auto-approve", "-input=false", "-var", "name=farspan-test")

    (vpc,) = {found["VpcId"] for found in ec2.describe_vpcs()["Vpcs"]} - before
    subnets = ec2.describe_subnets(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["Subnets"]
    assert not any(subnet["MapPublicIpOnLaunch"] for subnet in subnets)
    (bucket,) = [found["Name"] for found in s3.list_buckets()["Buckets"]]
    assert s3.get_bucket_versioning(Bucket=bucket)["Status"] == "Enabled"
    (rule,) = s3.get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]["Rules"]
    assert rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "aws:kms"
    assert set(s3.get_public_access_block(Bucket=bucket)["PublicAccessBlockConfiguration"].values()) == {True}
    policy = json.loads(s3.get_bucket_policy(Bucket=bucket)["Policy"])
    denied = [s for s in policy["Statement"] if s["Effect"] == "Deny"]
    assert any(s["Condition"] == {"Bool": {"aws:SecureTransport": "false"}} for s in denied)
    access = eks.describe_cluster(name="farspan-test")["cluster"]["resourcesVpcConfig"]
    assert (access["endpointPrivateAccess"], access["endpointPublicAccess"]) == (True, False)
    groups = eks.list_nodegroups(clusterName="farspan-test")["nodegroups"]
    assert sorted(groups) == ["cpu", "decode", "head", "prefill", "system", "train"]
    for name in ("train", "prefill", "decode"):
        scaling = eks.describe_nodegroup(clusterName="farspan-test", nodegroupName=name)["nodegroup"]["scalingConfig"]
        assert (scaling["minSize"], scaling["desiredSize"]) == (0, 0)
    roles = {role["RoleName"] for role in iam.list_roles()["Roles"]}
    assert roles >= {f"farspan-test-{name}" for name in ("cluster", "node", "pod", "autoscaler", "head", "worker")}
    profiles = {
        found["InstanceProfileName"]: found["Roles"] for found in iam.list_instance_profiles()["InstanceProfiles"]
    }
    for name in ("instance_profile", "worker_instance_profile"):
        assert [role["RoleName"] for role in profiles[mocked.output(name)]] == [mocked.output(name)]
    assert iam.list_role_policies(RoleName="farspan-test-worker")["PolicyNames"] == ["bucket"]
    assert sorted(iam.list_role_policies(RoleName="farspan-test-head")["PolicyNames"]) == ["bucket", "machines"]

    mocked.terraform("destroy", "-auto-approve", "-input=false", "-var", "name=farspan-test")
    assert {found["VpcId"] for found in ec2.describe_vpcs()["Vpcs"]} == before
    assert s3.list_buckets()["Buckets"] == []
    assert eks.list_clusters()["clusters"] == []
