"""What looks like a secret is found wherever it stands; names, paths and digests are none."""

import pytest

from farspan.cluster.secrets import holds_secret

# Put together here, so that no file of the project holds what looks like one.
SECRETS = [
    "AKIA" + "IOSFODNN7EXAMPLE",
    "/".join(["wJalrXUtnFEMI", "K7MDENG", "bPxRfiCYEXAMPLEKEY"]),
    "sk-" + "a1B2c3D4e5F6g7H8i9J0k1L2",
    "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3",
    "0123456789abcdef" * 4,
    "QUJD" * 12 + "RA==",
    "-----BEGIN" + " PRIVATE KEY-----",
    "RAY_AUTH_" + "TOKEN=x",
]
PLAIN = [
    "arn:aws:iam::000000000000:instance-profile/farspan-head",
    "projects/your-project/global/images/farspan-node",
    "registry.example.com/farspan@sha256:" + "0123456789abcdef" * 4,
    "s3://your-bucket/runs/farspan-train/checkpoints/step-000100",
    "/home/farspan/.cache/farspan/clusters/Farspan2/launcher.yaml",
    "python -m farspan.cli.main train /etc/farspan/train/run.yaml --join",
]


@pytest.mark.parametrize("secret", SECRETS, ids=range(len(SECRETS)))
def test_a_secret_is_found_as_a_value_a_key_and_inside_a_command(secret) -> None:
    assert holds_secret({"a": [{"b": secret}]})
    assert holds_secret({secret: 1})
    assert holds_secret({"command": f"export KEY='{secret}' && true"})


@pytest.mark.parametrize("plain", PLAIN, ids=range(len(PLAIN)))
def test_names_paths_and_digests_are_no_secrets(plain) -> None:
    assert not holds_secret({"a": [plain]})
