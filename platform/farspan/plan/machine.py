"""What a machine has, in bytes and per second. Torch-free.

Device figures are the vendors' public data sheets, dense bf16 without sparsity, bandwidths of one direction:
NVIDIA H100 SXM (80 GB HBM3 3.35 TB/s, 989 TFLOP/s, NVLink 4 900 GB/s both ways, PCIe 5), H200 SXM (141 GB, 4.8 TB/s),
A100 SXM (40 GB 1.555 TB/s, 80 GB 2.039 TB/s, 312 TFLOP/s, NVLink 3 600 GB/s both ways, PCIe 4), L40S (48 GB, 864 GB/s,
362 TFLOP/s, PCIe 4 only), L4 (24 GB, 300 GB/s, 121 TFLOP/s, PCIe 4 x8 half rate), B200 (180 GB in HGX, 7.7 TB/s,
2250 TFLOP/s, NVLink 5 1.8 TB/s both ways), AMD MI300X (192 GB, 5.3 TB/s, 1307 TFLOP/s, Infinity Fabric 896 GB/s both
ways in all), MI325X (256 GB, 6.0 TB/s). What a program reaches of them is a share that `farspan` assumes until it is
measured (calibrate.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from farspan.config.load import nearest
from farspan.errors import ConfigError, NotFoundError

GB, GIB = 1e9, 2**30


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of accelerator, by its data sheet."""

    name: str
    bytes: float
    flops: float
    """Dense bf16 operations a second."""
    memory_bandwidth: float
    node_bandwidth: float
    """To the other devices of the machine, bytes a second in one direction."""
    host_link: float
    """To host memory, bytes a second in one direction."""


DEVICES = {
    device.name: device
    for device in (
        Device("h100", 80 * GB, 989e12, 3.35e12, 450 * GB, 63 * GB),
        Device("h200", 141 * GB, 989e12, 4.8e12, 450 * GB, 63 * GB),
        Device("a100-40", 40 * GB, 312e12, 1.555e12, 300 * GB, 31.5 * GB),
        Device("a100-80", 80 * GB, 312e12, 2.039e12, 300 * GB, 31.5 * GB),
        Device("l40s", 48 * GB, 362e12, 0.864e12, 31.5 * GB, 31.5 * GB),
        Device("l4", 24 * GB, 121e12, 0.3e12, 15.8 * GB, 15.8 * GB),
        Device("b200", 180 * GB, 2250e12, 7.7e12, 900 * GB, 63 * GB),
        Device("mi300x", 192 * GB, 1307e12, 5.3e12, 448 * GB, 63 * GB),
        Device("mi325x", 256 * GB, 1307e12, 6.0e12, 448 * GB, 63 * GB),
    )
}


@dataclass(frozen=True, slots=True)
class Efficiency:
    """The share of the data sheet a training step reaches, and the price of one kernel."""

    gemm: float = 0.65
    attention: float = 0.5
    memory: float = 0.75
    node: float = 0.75
    network: float = 0.8
    host_link: float = 0.8
    launch_s: float = 5e-6
    measured: bool = False


@dataclass(frozen=True, slots=True)
class Machine:
    """Nodes with equal devices. Bytes of tiers are of one node; a device's share is its part of them."""

    device: Device
    devices_per_node: int = 1
    nodes: int = 1
    host_bytes: float = 0.0
    host_bandwidth: float = 300 * GB
    cxl_bytes: float = 0.0
    cxl_bandwidth: float = 30 * GB
    nvme_bytes: float = 0.0
    nvme_bandwidth: float = 6 * GB
    network_bandwidth: float = 50 * GB
    """Between nodes, for each device, one direction: 400 Gbit/s."""
    reserved_bytes: float = 1.5 * GIB
    """Of each device: the CUDA context, NCCL's buffers, kernels."""
    efficiency: Efficiency = field(default_factory=Efficiency)

    @property
    def num_devices(self) -> int:
        return self.devices_per_node * self.nodes

    def tier_bytes(self) -> dict[str, float]:
        """Memory of each tier that exists, for one device."""
        share = self.devices_per_node
        tiers = {
            "device": self.device.bytes - self.reserved_bytes,
            "host": self.host_bytes / share,
            "cxl": self.cxl_bytes / share,
            "nvme": self.nvme_bytes / share,
        }
        return {name: size for name, size in tiers.items() if size > 0}

    def spill_bandwidth(self, tier: str) -> float:
        """Bytes a second between one device and a tier, when all devices of the node use it."""
        bandwidths = {"host": self.host_bandwidth, "cxl": self.cxl_bandwidth, "nvme": self.nvme_bandwidth}
        return min(self.device.host_link * self.efficiency.host_link, bandwidths[tier] / self.devices_per_node)

    def between(self, num_neighbours: int) -> float:
        """Bytes a second a rank sends to others of a group of neighbouring ranks."""
        if num_neighbours <= self.devices_per_node:
            return self.device.node_bandwidth * self.efficiency.node
        return min(self.device.node_bandwidth, self.network_bandwidth) * self.efficiency.network

    def text(self) -> str:
        """The machine in a line."""
        nodes = f"{self.nodes} x " if self.nodes > 1 else ""
        tiers = [f"{size / GIB:.0f} GiB {name}" for name, size in self.tier_bytes().items() if name != "device"]
        text = f"{nodes}{self.devices_per_node} x {self.device.name} of {self.device.bytes / GIB:.1f} GiB"
        return f"{text}; for each: {', '.join(tiers)}" if tiers else text


def parse_machine(
    text: str,
    nodes: int = 1,
    host_gib: float | None = None,
    cxl_gib: float = 0.0,
    nvme_gib: float = 0.0,
    memory_gib: float | None = None,
) -> Machine:
    """`h100:8` -> eight H100 in each of `nodes` machines. `memory_gib` caps what may be used of each device.

    Raises:
        ConfigError: an unknown device or a count that is not one.
    """
    name, _, count = text.lower().partition(":")
    if name not in DEVICES:
        raise ConfigError("--gpu", "must be NAME or NAME:COUNT of a known device", text, nearest(name, list(DEVICES)))
    if count and not (count.isdigit() and int(count) > 0):
        raise ConfigError("--gpu", "must end in a number of devices", text, f"use --gpu {name}:8")
    if nodes < 1:
        raise ConfigError("--nodes", "must be at least 1", nodes, "use --nodes 1")
    device, number = DEVICES[name], int(count or 1)
    if memory_gib is not None:
        if not 2 <= memory_gib <= device.bytes / GIB:
            most = f"{device.bytes / GIB:.1f}"
            raise ConfigError("--memory", f"must lie in 2..{most} GiB for {name}", memory_gib, f"use --memory {most}")
        device = replace(device, bytes=memory_gib * GIB)
    return Machine(
        device=device,
        devices_per_node=number,
        nodes=nodes,
        # What machines with such devices usually have: three times the memory of the devices.
        host_bytes=3 * DEVICES[name].bytes * number if host_gib is None else host_gib * GIB,
        cxl_bytes=cxl_gib * GIB,
        nvme_bytes=nvme_gib * GIB,
    )


def sheet_of(name: str, memory: float | None = None) -> Device | None:
    """The data sheet of a device by the name its driver gives it; of several sizes the one with about `memory` bytes.

    None: an unknown device. Without `memory` the smallest size is meant.
    """
    said = name.lower().replace("-", " ").replace("_", " ").split()
    fits = [device for device in DEVICES.values() if device.name.split("-")[0] in said]
    return min(fits, key=lambda device: abs(device.bytes - (memory or 0.0)), default=None)


def size_text(num_bytes: float) -> str:
    """Bytes for a reader."""
    if num_bytes < 0.1 * GIB:
        return f"{num_bytes / 2**20:.0f} MiB"
    size = num_bytes / GIB
    return f"{size:,.0f} GiB" if size >= 100 else f"{size:.1f} GiB"


def save_calibration(file: Path, machine: Machine) -> None:
    """Write what was measured as JSON."""
    content: dict[str, Any] = {"device": asdict(machine.device), "efficiency": asdict(machine.efficiency)}
    content["host_bandwidth"] = machine.host_bandwidth
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def calibrated(machine: Machine, file: Path) -> Machine:
    """`machine` with the measured efficiencies of `file`.

    Raises:
        NotFoundError, ConfigError: no such file, or not one that was measured for this device.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        name, shares = content["device"]["name"], _efficiency(content["efficiency"])
        host_bandwidth = float(content["host_bandwidth"])
    except FileNotFoundError:
        raise NotFoundError(
            str(file), "no such calibration; run `farspan plan --calibrate FILE` on the machine"
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as problem:
        reason = f"{type(problem).__name__}: {problem}"
        raise ConfigError(
            "--calibration", "must be a file of `farspan plan --calibrate`", reason, "measure again"
        ) from None
    if name != machine.device.name:
        raise ConfigError("--calibration", f"must be measured on {machine.device.name}", name, f"use --gpu {name}")
    return replace(machine, efficiency=shares, host_bandwidth=host_bandwidth)


def _efficiency(content: Mapping[str, object]) -> Efficiency:
    known = {f.name for f in fields(Efficiency)}
    if set(content) != known:
        raise ValueError(f"efficiency holds {sorted(content)}, expected {sorted(known)}")
    return Efficiency(**content)  # type: ignore[arg-type]
