"""The watcher of a spot node asks EC2's metadata service as EC2 wants to be asked, and waits where it must."""

import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from tests.support.metadata import metadata_server

from farspan.cli import spot
from farspan.cli.spot import ask, watch_spot
from farspan.cluster.spot import SpotNotice

NOTICE = '{"action": "terminate", "time": "2026-09-18T08:22:00Z"}'


@pytest.fixture
def notice(tmp_path: Path) -> Path:
    """Where the notice will lie."""
    return tmp_path / "notice"


@pytest.fixture
def address(notice: Path) -> Iterator[str]:
    server = metadata_server("127.0.0.1", 0, notice)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join(30)


def test_there_is_a_notice_when_ec2_says_so_and_none_before(address: str, notice: Path) -> None:
    assert httpx.get(f"{address}/latest/meta-data/spot/instance-action", trust_env=False).status_code == 401
    with httpx.Client(base_url=address, trust_env=False) as client:
        assert ask(client) is None
        notice.write_text(NOTICE, encoding="utf-8")
        assert ask(client) == SpotNotice("terminate", datetime(2026, 9, 18, 8, 22, tzinfo=UTC))


def test_a_service_that_is_away_for_a_while_is_asked_on_and_said_once(
    tmp_path: Path, notice: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    drained: list[SpotNotice] = []
    monkeypatch.setattr(spot, "_drain", lambda said, poll_s, tell: drained.append(said))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    notice.write_text(NOTICE, encoding="utf-8")
    lines: list[str] = []
    servers: list[object] = []

    def tell(line: str) -> None:
        lines.append(line)
        if "does not answer" in line:
            # It comes back while the watcher goes on asking.
            server = metadata_server("127.0.0.1", port, notice)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            servers.append(server)

    try:
        watch_spot(f"http://127.0.0.1:{port}", 0.05, tell)
    finally:
        for server in servers:
            server.shutdown()  # type: ignore[attr-defined]
            server.server_close()  # type: ignore[attr-defined]
    assert [notice.action for notice in drained] == ["terminate"]
    assert [line.partition(":")[0] for line in lines] == [
        "watching http",
        "the metadata service does not answer",
        "EC2 will terminate this machine at 2026-09-18 08",
    ]


def test_a_node_is_watched_once(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    lines: list[str] = []
    with spot._alone() as first:
        assert first
        watch_spot(address, 0.05, lines.append)
    assert lines == ["this node is watched already"]
