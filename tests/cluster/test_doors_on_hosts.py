"""A head with a token and TLS lets in who has both, and tells everybody else in one sentence what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product

import pytest
from tests.support.corpus import small_corpus
from tests.support.ray_hosts import TOKEN, RayHosts, ray_on_hosts
from tests.support.runs import tiny_run

from farspan.cluster.certs import make_certificates
from farspan.cluster.environment import tls_switches
from farspan.config.load import dump_config
from farspan.config.schema import RunConfig

TOKENS, TRUSTS = ("right token", "wrong token", "no token"), ("TLS", "wrong CA", "plaintext")
CLOSED = [pair for pair in product(TOKENS, TRUSTS) if pair != (TOKENS[0], TRUSTS[0])]
# What is asked first is what is answered.
SAID = {
    "plaintext": "the cluster speaks TLS and this process does not",
    "wrong CA": "does not vouch for the cluster",
    "wrong token": "the cluster does not know the token of this process",
    "no token": "the cluster wants a token and this process has none",
}
# Ray alone goes on trying for minutes where it cannot make itself understood.
REFUSED_S = 60.0

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayHosts]:
    with ray_on_hosts({"CPU": 1}, tls=True) as found:
        make_certificates(found.folder / "other", [host.address for host in found.made], 1)
        (found.folder / "stranger").write_text("b" * 64, encoding="ascii")
        (found.folder / "stranger").chmod(0o600)
        yield found


@pytest.fixture(scope="module")
def run(cluster: RayHosts) -> RunConfig:
    config = tiny_run(small_corpus(cluster.folder), str(cluster.folder / "run"), "train.steps=2")
    (cluster.folder / "run.yaml").write_text(dump_config(config), encoding="utf-8")
    return config


def means(cluster: RayHosts, token: str, trust: str) -> dict[str, str]:
    """What a client with these has in its environment."""
    files = {"right token": "token", "wrong token": "stranger", "no token": "nothing"}
    tls = {"wrong CA": tls_switches(str(cluster.folder / "other")), "plaintext": {"RAY_USE_TLS": "0"}}
    return {"RAY_AUTH_TOKEN_PATH": str(cluster.folder / files[token]), **tls.get(trust, {})}


def reached(cluster: RayHosts, token: str, trust: str, log: str) -> tuple[str, str]:
    """The doctor's verdict on the head, and what it found."""
    words = ("doctor", "--cluster", "--node", cluster.address, "--json")
    _, text = cluster.farspan(1, *words, log=log, **means(cluster, token, trust)).end(REFUSED_S)
    findings = {finding["check"]: finding for finding in json.loads(text[text.index("{") :])["findings"]}
    found = findings[f"reaches {cluster.address}"]
    return found["verdict"], found["found"]


@pytest.mark.parametrize(("token", "trust"), CLOSED)
def test_whoever_lacks_the_token_or_the_trust_is_refused_and_told_what_is_missing(
    cluster: RayHosts, run: RunConfig, token: str, trust: str
) -> None:
    said = SAID.get(trust) or SAID[token]
    log, file = f"{token}-{trust}".replace(" ", "-"), str(cluster.folder / "run.yaml")
    join = cluster.farspan(1, "train", file, "--join", log=f"{log}.log", **means(cluster, token, trust))
    code, text = join.end(REFUSED_S)
    assert code == 1, text
    (line,) = [line for line in text.splitlines() if "cannot be joined" in line]
    assert said in line
    assert text.rstrip().endswith(line)
    assert "Traceback" not in text
    assert not {TOKEN, "b" * 64} & set(text.split())
    verdict, found = reached(cluster, token, trust, f"{log}-doctor.log")
    assert verdict == "FAIL"
    assert said in found


def test_whoever_has_both_trains_on_it(cluster: RayHosts, run: RunConfig) -> None:
    assert reached(cluster, *TOKENS[:1], *TRUSTS[:1], "doctor.log") == ("OK", "answers")
    code, text = cluster.farspan(1, "train", str(cluster.folder / "run.yaml"), "--join", log="right.log").end()
    assert code == 0, text
    assert f"model published: {run.output}/model" in text
