"""From what a user wrote to open tiers, and from this machine to the tiers it has."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from farspan.errors import ConfigError
from farspan.memory.dax import DaxTier
from farspan.memory.device import DeviceTier
from farspan.memory.emulated import EmulatedTier, Shape
from farspan.memory.host import CxlTier, DramTier
from farspan.memory.numa import find_nodes
from farspan.memory.nvme import NvmeTier
from farspan.memory.object_store import Objects, ObjectStoreTier
from farspan.memory.tier import Tier

_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_FORMS = (
    "dram:SIZE, cxl:node=N:SIZE, cxl:/dev/daxX.Y:SIZE, cxl:emulated:SIZE, nvme:FOLDER:SIZE, objects:URI:SIZE, "
    "device:SIZE; SIZE is like 64GiB"
)
# A stand-in in the order of one CXL 2.0 x8 expander: slower than local memory, twice as late. Not a measurement.
CXL_SHAPE = Shape(read_bytes_per_s=22e9, write_bytes_per_s=18e9, latency_s=600e-9)


def open_tiers(
    descriptions: Sequence[str], device: torch.device, open_store: Callable[[str], Objects]
) -> dict[str, list[Tier]]:
    """Open the tiers a run names, by kind, in the order given; the caller closes them.

    `open_store` turns a URI into a store (`farspan.storage.door.open_store`).

    Raises:
        ConfigError: a description is not one.
        TierError: the machine does not have it.
    """
    tiers: dict[str, list[Tier]] = {}
    try:
        for text in descriptions:
            tier = open_tier(text, device, open_store)
            tiers.setdefault(tier.kind, []).append(tier)
    except Exception:
        for opened in tiers.values():
            for tier in opened:
                tier.close()
        raise
    return tiers


def open_tier(text: str, device: torch.device, open_store: Callable[[str], Objects]) -> Tier:
    """One tier from its description; see `open_tiers`."""
    kind, where, capacity = parse_tier(text)
    if kind == "dram" and not where:
        return DramTier(capacity, device=device)
    if kind == "device" and not where and device.type == "cuda":
        return DeviceTier(device, capacity)
    if kind == "cxl" and where == "emulated":
        return EmulatedTier("cxl", "cxl", capacity, CXL_SHAPE)
    if kind == "cxl" and (node := re.fullmatch(r"node=(\d+)", where)):
        return _cxl_node(int(node[1]), capacity, device, text)
    if kind == "cxl" and where.startswith("/"):
        return DaxTier(Path(where), capacity, device=device)
    if kind == "nvme" and where:
        return NvmeTier(Path(where), capacity)
    if kind == "objects" and where:
        return ObjectStoreTier(open_store(where), capacity)
    raise ConfigError("memory.tiers", "must describe a tier this machine can have", text, f"write one of {_FORMS}")


def parse_tier(text: str) -> tuple[str, str, int]:
    """`cxl:node=1:64GiB` -> (cxl, node=1, bytes); whether there is such a tier shows when it is opened.

    Raises:
        ConfigError: it does not end in a size.
    """
    kind, _, rest = text.partition(":")
    where, _, size = rest.rpartition(":")
    return kind, where, parse_bytes(size, text)


def parse_bytes(size: str, text: str) -> int:
    """`64GiB` -> bytes.

    Raises:
        ConfigError: it is no size, or zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(|[KMGT]iB)", size)
    if match is None or float(match[1]) == 0:
        raise ConfigError("memory.tiers", "must end with a size", text, f"write one of {_FORMS}")
    return int(float(match[1]) * _UNITS[match[2]])


def _cxl_node(index: int, capacity: int, device: torch.device, text: str) -> Tier:
    nodes = {node.index: node for node in find_nodes()}
    bare = [i for i, node in nodes.items() if node.num_cpus == 0]
    way_out = f"this machine's nodes without processors are {bare}" if bare else "write cxl:emulated:SIZE to try it out"
    if index not in nodes or nodes[index].num_cpus:
        raise ConfigError("memory.tiers", "must name a NUMA node without processors", text, way_out)
    return CxlTier(index, capacity, device=device)
