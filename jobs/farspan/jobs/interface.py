"""Workers talk over the interface that carries the address Ray knows their node by.

Left alone, gloo binds to what the machine's own name means, which Debian and Ubuntu install as loopback, and NCCL to
the first interface it likes: workers on different nodes then wait for each other until they give up.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.torch import TorchConfig

# Of ioctl(2) on Linux: the address and the netmask of an interface.
_SIOCGIFADDR, _SIOCGIFNETMASK = 0x8915, 0x891B
_IFREQ_BYTES, _ADDRESS_AT = 256, 20


@dataclass
class LinkedTorchConfig(TorchConfig):
    """Ray Train's process group, over the right interface."""

    @property
    def backend_cls(self) -> Any:
        return _LinkedBackend


_RayBackend: Any = TorchConfig().backend_cls


class _LinkedBackend(_RayBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        # In the workers, before they form a group: both libraries read it then, and again for every subgroup.
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        # Where one was lost the others wait for it in a collective. To leave the group in good order would wait with
        # them, and Ray would then wait for each of them to answer, before it ends them anyway.
        seen = worker_group.get_latest_poll_status()
        if seen is None or not seen.errors:
            super().on_shutdown(worker_group, backend_config)


def choose_interface() -> None:
    """Let this process's groups go over the interface of its node's address."""
    talk_over(ray.util.get_node_ip_address())


def talk_over(address: str) -> None:
    """Tell gloo and NCCL the interface of an address of this machine; what its owner set stays."""
    name = interface_of(address)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        # Without the sign it would be a prefix: eth1 also means eth10.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def interface_of(address: str) -> str | None:
    """The interface that carries an IPv4 address of this machine, or else one of its network; None: none does."""
    wanted = ipaddress.ip_address(address)
    carried = _carried()
    exact = [name for name, own in carried if own.ip == wanted]
    near = [name for name, own in carried if wanted in own.network]
    return next(iter([*exact, *near]), None)


def _carried() -> list[tuple[str, ipaddress.IPv4Interface]]:
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = struct.pack(f"{_IFREQ_BYTES}s", name.encode())
            try:
                address, mask = (
                    socket.inet_ntoa(fcntl.ioctl(asked, what, request)[_ADDRESS_AT : _ADDRESS_AT + 4])
                    for what in (_SIOCGIFADDR, _SIOCGIFNETMASK)
                )
            except OSError:
                # Without an IPv4 address.
                continue
            found.append((name, ipaddress.IPv4Interface(f"{address}/{mask}")))
    return found
