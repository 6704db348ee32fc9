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
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig

# Of ioctl(2) on Linux: the address and the netmask of an interface.
_SIOCGIFADDR, _SIOCGIFNETMASK = 0x8915, 0x891B
_IFREQ_BYTES, _ADDRESS_AT = 256, 20
# Beside what the group itself may take to form: torch is imported first.
_IMPORT_S = 300.0
_LEAVE_S = 30.0


@dataclass
class LinkedTorchConfig(BackendConfig):
    """The process group of Ray Train's workers, over the right interface.

    Not Ray Train's own: whoever reads that one imports torch, and its controller reads it before it asks for the first
    worker.
    """

    backend: str
    timeout_s: int = 1800

    @property
    def backend_cls(self) -> Any:
        return _LinkedBackend


class _LinkedBackend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        host, port = worker_group.execute_single(0, get_address_and_port)
        count = len(worker_group)
        joined = [
            worker_group.execute_single_async(rank, join_group, backend_config, host, port, rank, count)
            for rank in range(count)
        ]
        ray.get(joined, timeout=backend_config.timeout_s + _IMPORT_S)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        # Where one was lost the others wait for it in a collective. To leave the group in good order would wait with
        # them, and Ray would then wait for each of them to answer, before it ends them anyway.
        seen = worker_group.get_latest_poll_status()
        if seen is None or not seen.errors:
            left = worker_group.execute_async(leave_group, len(worker_group))
            with suppress(GetTimeoutError):
                ray.get(left, timeout=_LEAVE_S)


def join_group(config: LinkedTorchConfig, host: str, port: int, rank: int, count: int) -> None:
    """In a worker: form the group of all `count` of them, whose first listens there, as Ray Train forms it."""
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    # Both libraries read it when a group is formed, and again for every subgroup.
    choose_interface()
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = host, str(port)
    _set_torch_distributed_env_vars()
    _setup_torch_process_group(config.backend, rank, count, "env://", config.timeout_s)


def leave_group(count: int) -> None:
    """In a worker: leave the group of `count` in good order, and give back what the device holds for later."""
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=count > 1)


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
