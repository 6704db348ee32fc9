"""NUMA nodes of this machine: which exist, binding memory to one, and reading where pages really are.

Sources: mbind(2), numa(7), /sys/devices/system/node (Linux). libnuma is loaded when a binding is asked for.
"""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path

from farspan.errors import TierError

_NODES = Path("/sys/devices/system/node")
_NUMA_MAPS = Path("/proc/self/numa_maps")
# From linux/mempolicy.h: allocate from these nodes only; move pages that are elsewhere, and fail if one cannot move.
_MPOL_BIND, _MPOL_MF_STRICT, _MPOL_MF_MOVE = 2, 1, 2
_MAX_NODES = 1024


@dataclass(frozen=True, slots=True)
class NumaNode:
    """One node; without processors it is memory alone, as CXL expanders are."""

    index: int
    num_cpus: int
    total_bytes: int
    free_bytes: int


def find_nodes(root: Path = _NODES) -> list[NumaNode]:
    """The nodes Linux shows, by index; empty where it shows none."""
    folders = [p for p in root.glob("node*") if re.fullmatch(r"node\d+", p.name)]
    return sorted((_read_node(p) for p in folders), key=lambda node: node.index)


def parse_cpu_list(text: str) -> list[int]:
    """`0-3,8` -> [0, 1, 2, 3, 8]; empty text is no processor."""
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return cpus


def parse_numa_maps(text: str) -> dict[int, dict[int, int]]:
    """Start address of each mapping -> {node: pages on it}. Mappings without pages are there, and empty."""
    return {
        int(line.split(" ", 1)[0], 16): {int(node): int(pages) for node, pages in re.findall(r"\bN(\d+)=(\d+)", line)}
        for line in text.splitlines()
        if line
    }


def pages_of(address: int) -> dict[int, int]:
    """{node: pages} of the mapping of this process around `address`, as the kernel counts them.

    Neighbouring mappings of one policy are one to the kernel.

    Raises:
        TierError: the kernel keeps no such map, or shows no mapping there.
    """
    try:
        maps = parse_numa_maps(_NUMA_MAPS.read_text())
    except OSError as problem:
        raise TierError("numa", f"{_NUMA_MAPS} could not be read: {problem}; this kernel keeps no NUMA map") from None
    start = max((first for first in maps if first <= address), default=None)
    if start is None:
        raise TierError("numa", f"{_NUMA_MAPS} shows no mapping around {address:#x}; give an address in use")
    return maps[start]


def bind_to_node(address: int, nbytes: int, node: int, tier: str) -> None:
    """Every page of this range comes from `node`, now and later.

    Raises:
        TierError: libnuma is missing, or the kernel refused.
    """
    try:
        mbind = ctypes.CDLL("libnuma.so.1", use_errno=True).mbind
    except OSError:
        raise TierError(
            tier, f"memory on NUMA node {node} needs libnuma; install it (libnuma1, numactl-libs)"
        ) from None
    mbind.restype = ctypes.c_long
    word_bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask = (ctypes.c_ulong * (_MAX_NODES // word_bits))()
    mask[node // word_bits] = 1 << (node % word_bits)
    flags = ctypes.c_uint(_MPOL_MF_STRICT | _MPOL_MF_MOVE)
    refused = mbind(
        ctypes.c_void_p(address), ctypes.c_ulong(nbytes), ctypes.c_int(_MPOL_BIND), mask,
        ctypes.c_ulong(_MAX_NODES), flags,
    )  # fmt: skip
    if refused:
        reason = os.strerror(ctypes.get_errno())
        raise TierError(tier, f"{nbytes} bytes could not be bound to NUMA node {node}: {reason}; does the node exist?")


def _read_node(folder: Path) -> NumaNode:
    sizes = dict(re.findall(r"(MemTotal|MemFree):\s+(\d+) kB", (folder / "meminfo").read_text()))
    return NumaNode(
        index=int(folder.name.removeprefix("node")),
        num_cpus=len(parse_cpu_list((folder / "cpulist").read_text())),
        total_bytes=int(sizes.get("MemTotal", 0)) * 1024,
        free_bytes=int(sizes.get("MemFree", 0)) * 1024,
    )
