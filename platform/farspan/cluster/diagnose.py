"""What a launcher's output, or a file that could not be written, comes down to: one sentence with the way out."""

from __future__ import annotations

import errno
import re

# In the order of how sure each of them names the cause; the first that matches is told.
_CAUSES = (
    (r"ProfileNotFound", "there is no such AWS profile; correct AWS_PROFILE, or run aws configure"),
    (r"PartialCredentialsError", "half of the AWS credentials is missing; run aws configure, or aws sso login"),
    (
        r"NoCredentialsError|Unable to locate credentials",
        "no AWS credentials were found; run aws configure, or aws sso login",
    ),
    (r"ExpiredToken|RequestExpired|Token has expired", "the AWS credentials have expired; log in again"),
    (
        r"AuthFailure|InvalidClientTokenId|SignatureDoesNotMatch|UnrecognizedClient",
        "AWS does not know these credentials; check the profile",
    ),
    (
        r"DefaultCredentialsError|Could not automatically determine credentials",
        "no Google credentials were found; run gcloud auth application-default login",
    ),
    (
        r"UnauthorizedOperation|AccessDenied|accessDenied",
        "the credentials may not do this; infra/README.md lists the rights a cluster needs",
    ),
    (r"InvalidAMIID", "the region has no such image; set aws.image"),
    (
        r"InvalidSubnetID|InvalidSubnet|Not all subnet IDs found|No usable subnets",
        "the region has no such subnet; set aws.subnet",
    ),
    (
        r"InvalidGroup\.NotFound|InvalidGroupId|InvalidSecurityGroup",
        "the region has no such security group; set aws.security_group",
    ),
    (r"InvalidKeyPair", "the region has no such key pair; set aws.key_name"),
    (
        r"[Ii]nvalid IAM Instance Profile|InvalidIamInstanceProfile",
        "there is no such instance profile; set aws.account, aws.instance_profile and aws.worker_instance_profile",
    ),
    (
        r"Invalid value '[^']*' for InstanceType|InvalidInstanceType",
        "EC2 has no such machine; set aws of that kind of node",
    ),
    (
        r"InsufficientInstanceCapacity|ZONE_RESOURCE_POOL_EXHAUSTED",
        "the zone has no such machine free; try another zone or machine",
    ),
    (
        r"VcpuLimitExceeded|InstanceLimitExceeded|QUOTA_EXCEEDED",
        "your quota does not allow so many machines; raise it or lower max_nodes",
    ),
    (
        r"EndpointConnectionError|Could not connect to the endpoint|Could not resolve host",
        "the cloud's API cannot be reached; check region and network",
    ),
    (r"No space left on device", "a disk is full; free space, or raise disk_gib"),
    (
        r"[Aa]ddress already in use|port \d+ is (already )?in use|is already in use by",
        "a port that Ray needs is taken on the head; stop what listens there",
    ),
    (
        r"AuthenticationError|[Ii]nvalid auth(entication)? token|Unauthenticated",
        "the token was refused; every machine needs the same ~/.ray/auth_token",
    ),
    (
        r"Could not find a version|No matching distribution",
        "a node found no such package; does the subnet reach the package index?",
    ),
    (
        r"Permission denied \(publickey|bad permissions|UNPROTECTED PRIVATE KEY",
        "the head refuses the SSH key; check ssh_user and ssh_private_key, which needs mode 600",
    ),
    (
        r"SSH still not available|ssh: connect to host|Connection timed out|No route to host|Connection refused",
        "the head does not answer SSH; is its subnet reachable from here, and port 22 open?",
    ),
)


_FULL = (errno.ENOSPC, errno.EDQUOT)


def cannot_write(problem: OSError) -> str:
    """Why a file could not be written, and what to do."""
    way_out = "free space" if problem.errno in _FULL else "make its folder one that you may write to"
    return f"could not be written: {problem.strerror or problem}; {way_out}"


_COLOR = re.compile(r"\x1b\[[0-9;]*m")
# What the launcher says itself, and ssh when it ends; every other line is a node's.
_LAUNCHERS = re.compile(r"\d{4}-\d\d-\d\d |Shared connection to |\s|$")


def diagnose(output: str) -> str:
    """The cause a launcher's output points to, the last words of a node that could not be set up, or its last line."""
    for pattern, sentence in _CAUSES:
        if re.search(pattern, output):
            return sentence
    lines = _COLOR.sub("", output).splitlines()
    failed = next((i for i, line in enumerate(lines) if "update-failed" in line), None)
    said = [line for line in lines[: failed or 0] if not _LAUNCHERS.match(line)]
    if said:
        return f"a machine could not be set up: {said[-1].strip()}"
    told = [line.strip() for line in lines if line.strip()]
    return told[-1] if told else "it said nothing"
