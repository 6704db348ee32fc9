"""Where the kernel says pages are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from farspan.errors import TierError
from farspan.memory.host import CxlTier
from farspan.memory.numa import bind_to_node, find_nodes, pages_of, parse_cpu_list, parse_numa_maps

# In the form of a machine with a node without processors (node 1).
CAPTURED = """\
55d0c8a00000 default file=/usr/bin/python3.12 mapped=142 active=0 N0=142 kernelpagesize_kB=4
7f2c14000000 bind:1 anon=2048 dirty=2048 N1=2048 kernelpagesize_kB=4
7f2c24000000 interleave:0-1 anon=1024 dirty=1024 active=512 N0=512 N1=512 kernelpagesize_kB=4
7f2c3c021000 default
7ffd1b5e0000 default stack anon=5 dirty=5 N0=5 kernelpagesize_kB=4
"""


def test_the_map_of_pages_is_read_per_mapping_and_node() -> None:
    maps = parse_numa_maps(CAPTURED)
    assert maps[0x7F2C14000000] == {1: 2048}
    assert maps[0x7F2C24000000] == {0: 512, 1: 512}
    assert maps[0x7F2C3C021000] == {}
    assert len(maps) == 5


@pytest.mark.parametrize(("text", "cpus"), [("0-3,8\n", [0, 1, 2, 3, 8]), ("\n", []), ("5", [5]), ("0,2-3", [0, 2, 3])])
def test_cpu_lists_are_read(text: str, cpus: list[int]) -> None:
    assert parse_cpu_list(text) == cpus


def test_a_node_without_processors_is_recognized(tmp_path: Path) -> None:
    for index, cpus in ((0, "0-1"), (1, ""), (10, "2")):
        folder = tmp_path / f"node{index}"
        folder.mkdir()
        (folder / "cpulist").write_text(cpus + "\n")
        (folder / "meminfo").write_text(f"Node {index} MemTotal: 2048 kB\nNode {index} MemFree:  1024 kB\n")
    (tmp_path / "online").write_text("0-1")
    found = [(n.index, n.num_cpus, n.total_bytes, n.free_bytes) for n in find_nodes(tmp_path)]
    assert found == [(0, 2, 2 << 20, 1 << 20), (1, 0, 2 << 20, 1 << 20), (10, 1, 2 << 20, 1 << 20)]


def test_memory_bound_to_this_machines_node_is_on_it() -> None:
    nodes = find_nodes()
    if not nodes:
        pytest.skip("this kernel shows no NUMA nodes")
    tier = CxlTier(nodes[-1].index, 8 << 20)
    region = tier.allocate(4 << 20, "test")
    tier.store(region, torch.ones(4 << 20, dtype=torch.uint8)).finish()
    pages = pages_of(tier.memory_of(region).data_ptr())
    assert set(pages) == {nodes[-1].index}
    assert pages[nodes[-1].index] >= 1
    tier.free(region)
    tier.close()


def test_memory_on_a_second_node_is_there_and_nowhere_else() -> None:
    nodes = find_nodes()
    if len(nodes) < 2:
        pytest.skip(f"needs a second NUMA node, this machine has {len(nodes)}; a QEMU guest can have one")
    for node in nodes:
        tier = CxlTier(node.index, 8 << 20)
        region = tier.allocate(4 << 20, "test")
        tier.store(region, torch.ones(4 << 20, dtype=torch.uint8)).finish()
        assert set(pages_of(tier.memory_of(region).data_ptr())) == {node.index}
        tier.free(region)
        tier.close()


def test_a_node_that_does_not_exist_is_refused() -> None:
    memory = torch.empty(1 << 20, dtype=torch.uint8)
    aligned = -(-memory.data_ptr() // 4096) * 4096
    with pytest.raises(TierError, match="NUMA node 999"):
        bind_to_node(aligned, 4096, 999, "cxl999")
