"""An address leads to the interface that carries it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import ray

from farspan.jobs.interface import LinkedTorchConfig, choose_interface, interface_of

NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture
def _unset() -> Iterator[None]:
    """Both variables are as they were afterwards, whatever was set."""
    before = {name: os.environ.pop(name, None) for name in NAMES}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2"])
def test_loopback_carries_all_of_its_network(address: str) -> None:
    assert interface_of(address) in {name for _, name in socket.if_nameindex() if name.startswith("lo")}


@pytest.mark.parametrize("address", ["203.0.113.9", "2001:db8::1"])
def test_an_address_of_another_machine_has_no_interface_here(address: str) -> None:
    assert interface_of(address) is None


@pytest.mark.usefixtures("_unset")
def test_workers_are_told_the_interface_of_their_node_and_keep_what_they_were_told_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    os.environ["NCCL_SOCKET_IFNAME"] = "ib"
    choose_interface()
    assert [os.environ[name] for name in NAMES] == [interface_of("127.0.0.1"), "ib"]


@pytest.mark.usefixtures("_unset")
def test_nothing_is_chosen_where_no_interface_has_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "203.0.113.9")
    choose_interface()
    assert not set(NAMES) & set(os.environ)


class _Group:
    """A worker group of Ray Train's, and whether its workers were asked to leave their process group."""

    def __init__(self, errors: dict[int, Exception] | None) -> None:
        self._seen = None if errors is None else SimpleNamespace(errors=errors)
        self.asked = False

    def get_latest_poll_status(self) -> SimpleNamespace | None:
        return self._seen

    def execute_async(self, *_: object, **__: object) -> list[object]:
        self.asked = True
        return []

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("errors", "asked"), [(None, True), ({}, True), ({1: RuntimeError("its host is gone")}, False)]
)
def test_workers_that_wait_for_a_lost_one_are_not_asked_to_leave_in_good_order(
    errors: dict[int, Exception] | None, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "get", lambda futures, timeout: [])
    group = _Group(errors)
    config = LinkedTorchConfig(backend="gloo")
    config.backend_cls().on_shutdown(group, config)
    assert group.asked == asked
