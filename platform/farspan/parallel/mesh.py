"""Who works with whom: workers = dp x sp ranks; neighbours in rank order share a sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Mesh:
    """The two axes of a run. `all` spans both: weights are sharded, gradients summed and labels counted over it."""

    axes: DeviceMesh
    all: DeviceMesh

    @property
    def sp_group(self) -> dist.ProcessGroup:
        return self.axes["sp"].get_group()

    @property
    def dp_rank(self) -> int:
        return self.axes["dp"].get_local_rank()

    @property
    def dp(self) -> int:
        return self.axes["dp"].size()

    @property
    def sp(self) -> int:
        return self.axes["sp"].size()


def make_mesh(device_type: str, sp: int) -> Mesh:
    """The mesh of every rank of the default process group."""
    world = dist.get_world_size()
    return Mesh(
        axes=init_device_mesh(device_type, (world // sp, sp), mesh_dim_names=("dp", "sp")),
        all=init_device_mesh(device_type, (world,), mesh_dim_names=("all",)),
    )
