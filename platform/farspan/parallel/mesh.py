"""Who works with whom: workers = dp x sp ranks, sp = ring x ulysses; neighbours in rank order share a sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Mesh:
    """The axes of a run: dp, ring and ulysses, neighbours on `ulysses` being neighbours in rank order.

    `all` spans every rank: weights are sharded, gradients summed and labels counted over it.
    """

    axes: DeviceMesh
    sequence: DeviceMesh
    all: DeviceMesh

    @property
    def sp_group(self) -> dist.ProcessGroup:
        """The ranks that share this rank's sequence."""
        return self.sequence["sp"].get_group()

    @property
    def ring_group(self) -> dist.ProcessGroup:
        """Of those, one from each group that exchanges heads."""
        return self.axes["ring"].get_group()

    @property
    def ulysses_group(self) -> dist.ProcessGroup:
        """Of those, the neighbours that exchange heads."""
        return self.axes["ulysses"].get_group()

    @property
    def dp_rank(self) -> int:
        return self.sequence["dp"].get_local_rank()

    @property
    def dp(self) -> int:
        return self.sequence["dp"].size()

    @property
    def sp(self) -> int:
        return self.sequence["sp"].size()


def make_mesh(device_type: str, sp: int, ulysses: int = 1) -> Mesh:
    """The mesh of every rank of the default process group; `ulysses` of the `sp` ranks exchange heads."""
    world = dist.get_world_size()
    axes = (world // sp, sp // ulysses, ulysses)
    return Mesh(
        axes=init_device_mesh(device_type, axes, mesh_dim_names=("dp", "ring", "ulysses")),
        sequence=init_device_mesh(device_type, (world // sp, sp), mesh_dim_names=("dp", "sp")),
        all=init_device_mesh(device_type, (world,), mesh_dim_names=("all",)),
    )
