"""Hosts out of namespaces are hosts: apart, on one switch, and they can be cut off, slowed down and killed."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.hosts import Host, hidden_by_tmp, hosts

# One connection, `size` bytes, how long it took: sent by the client, timed by the server from first to last byte.
_SERVER = """
import socket, sys, time
with socket.create_server((sys.argv[1], 7000)) as listener:
    print("listens", flush=True)
    while True:
        peer, _ = listener.accept()
        with peer:
            got, begin = len(peer.recv(1 << 16)), time.monotonic()
            while part := peer.recv(1 << 16):
                got += len(part)
            print(got, time.monotonic() - begin, flush=True)
            peer.sendall(b"%d %f" % (got, time.monotonic() - begin))
"""
_CLIENT = """
import socket, sys
with socket.create_connection((sys.argv[1], 7000), timeout=float(sys.argv[3])) as peer:
    peer.sendall(bytes(int(sys.argv[2])))
    peer.shutdown(socket.SHUT_WR)
    print(peer.recv(100).decode())
"""
_DEADLINE_S = 60.0


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[Host]]:
    """Two hosts; the first one listens."""
    with hosts(2) as made:
        log = tmp_path / "server.log"
        server = made[0].start(sys.executable, "-c", _SERVER, made[0].address, log=log)
        ends = time.monotonic() + _DEADLINE_S
        while "listens" not in log.read_text(encoding="utf-8"):
            assert time.monotonic() < ends, log.read_text(encoding="utf-8")
            assert server.poll() is None, log.read_text(encoding="utf-8")
            time.sleep(0.05)
        try:
            yield made
        finally:
            server.kill()
            server.wait(_DEADLINE_S)


def send(pair: list[Host], size: int, patience_s: float = 30.0) -> float | None:
    """Megabits a second of `size` bytes from the second host to the first; None: nobody answered."""
    words = (sys.executable, "-c", _CLIENT, "host0", str(size), str(patience_s))
    answer = pair[1].run(*words, timeout_s=_DEADLINE_S)
    if answer.returncode != 0:
        return None
    got, seconds = answer.stdout.split()
    assert int(got) == size
    return size * 8 / 1e6 / float(seconds)


def test_what_lies_in_tmp_is_hidden_from_hosts_and_what_lies_elsewhere_is_not() -> None:
    assert hidden_by_tmp("/usr", "/tmp/checkout/.venv", "/tmp") == "/tmp/checkout/.venv"
    assert hidden_by_tmp("/usr", "/tmpfiles", "/var/tmp") is None


@pytest.mark.parametrize("refused", ["ip link add", "type veth", "tbf"])
def test_a_machine_that_refuses_a_part_of_hosts_skips_their_tests_and_says_which(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tools that do all but one thing, as in a container without the right or a kernel without the module.
    for name in ("ip", "tc", "unshare", "nsenter", "mount"):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/sh\ncase "{name} $*" in *"{refused}"*) echo no such thing >&2; exit 2;; esac\n')
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(pytest.skip.Exception, match=f"{refused}.*no such thing"), hosts(1):
        raise AssertionError("hosts were made")


def test_hosts_have_names_processes_and_files_of_their_own(pair: list[Host]) -> None:
    assert [host.run("hostname").stdout.strip() for host in pair] == ["host0", "host1"]
    processes = pair[1].run("sh", "-c", "ls -d /proc/[0-9]*").stdout.split()
    assert len(processes) < 10
    pair[0].run("touch", "/tmp/mine", "/dev/shm/mine")
    assert pair[1].run("ls", "/tmp", "/dev/shm").stdout.split() == ["/dev/shm:", "/tmp:"]
    assert not Path("/tmp/mine").exists()
    assert pair[0].run("getent", "hosts", "host1").stdout.split()[0] == pair[1].address
    routes = pair[0].run("ip", "route").stdout
    assert "default" not in routes


def test_a_capped_link_carries_what_the_cap_says(pair: list[Host]) -> None:
    free = send(pair, 8_000_000)
    assert free is not None
    pair[1].cap(20)
    capped = send(pair, 5_000_000)
    assert capped is not None
    # The burst passes at once, headers are not counted, a busy machine reads late or slowly: within a factor of two.
    assert 10 <= capped <= 40
    assert free > 3 * capped
    pair[1].uncap()
    again = send(pair, 8_000_000)
    assert again is not None
    assert again > 3 * capped


def test_a_cut_link_carries_nothing_until_it_is_restored(pair: list[Host]) -> None:
    assert send(pair, 1000) is not None
    pair[1].cut()
    assert send(pair, 1000, patience_s=2) is None
    pair[1].restore()
    ends = time.monotonic() + _DEADLINE_S
    while send(pair, 1000, patience_s=5) is None:
        assert time.monotonic() < ends, "the restored link carries nothing"


def test_a_killed_host_takes_all_its_processes_with_it(pair: list[Host], tmp_path: Path) -> None:
    sleeper = pair[0].start("sleep", "1000", log=tmp_path / "sleeper.log")
    assert send(pair, 1000) is not None
    pair[0].kill()
    assert sleeper.wait(_DEADLINE_S) != 0
    assert send(pair, 1000, patience_s=2) is None


def test_nothing_of_the_hosts_stays_behind() -> None:
    with hosts(1) as made:
        netns, first = made[0].netns, made[0].first
        assert Path(f"/run/netns/{netns}").exists()
    assert first.poll() is not None
    assert not Path(f"/run/netns/{netns}").exists()
    assert not Path(f"/sys/class/net/{netns}").exists()
