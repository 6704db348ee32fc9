"""An optimizer that lives in host memory: the device keeps weights and nothing else of it.

Gradients leave the device as backward makes them, and are added up on the host when there are several passes. Once
backward is over, the norm is taken and the weights are stepped there, weight by weight on several threads, and each
weight goes back to the device while the next ones are stepped.

The step itself waits for the last gradient: the global norm is not known before, and a step without it would be another
optimizer. What overlaps with backward is the traffic, which is what costs time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from farspan.memory.host import DramTier
from farspan.memory.inplace import InPlaceTier
from farspan.memory.tier import DEADLINE_S, Region
from farspan.memory.transfer import Finished, ThreadLane, Transfer
from farspan.optim.adamw8bit import BLOCK, in_blocks, restore_states
from farspan.optim.shards import like_shard, local_of

OWNER = "optimizer"
MakeInner = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


@dataclass(eq=False)
class _Slot:
    """One weight: on the device, and its master, gradient and optimizer on the host."""

    weight: nn.Parameter
    master: nn.Parameter
    master_region: Region
    grad_region: Region
    inner: torch.optim.Optimizer
    next_region: Region | None = None
    arriving: Transfer = Finished()  # noqa: RUF009
    states: dict[str, Region] = field(default_factory=dict)
    """Where the moments lie, by name."""
    num_passes: int = 0
    seen: tuple[int, int] = (0, 0)


class HostOptimizer(torch.optim.Optimizer):
    """`make_inner` makes the optimizer of one master weight; `tier` is local DRAM: the processor computes on it."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        make_inner: MakeInner,
        tier: InPlaceTier,
        *,
        num_threads: int = 2,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        super().__init__(groups, {})
        self._tier, self._deadline_s = tier, deadline_s
        self._adding = ThreadLane("gradients", 1)
        self._stepping = ThreadPoolExecutor(num_threads, thread_name_prefix="farspan-optimizer")
        self._slots: dict[nn.Parameter, _Slot] = {}
        self._hooks = []
        self._leaving: list[Transfer] = []
        for group in self.param_groups:
            settings = {k: v for k, v in group.items() if k != "params"}
            for weight in group["params"]:
                self._slots[weight] = self._slot(weight, settings, make_inner)
                self._hooks.append(weight.register_post_accumulate_grad_hook(self._take_gradient))
        self.state = _HostStates(self._slots)  # type: ignore[assignment]

    @torch.no_grad()
    def clip_grad_norm(self, weights: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Scale the gradients of `weights` so that their global L2 norm is at most `max_norm`; gives the norm before.

        Their order is the order of the sum: another one gives other last bits.
        """
        arrived = {slot.weight: slot for slot in self._arrived()}
        slots = [arrived[weight] for weight in weights if weight in arrived]
        norm = _total_norm(slots)
        torch.nn.utils.clip_grads_with_norm_([slot.master for slot in slots], max_norm, norm.cpu(), foreach=False)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        slots = self._arrived()
        for group in self.param_groups:
            settings = {k: v for k, v in group.items() if k != "params"}
            for weight in group["params"]:
                self._slots[weight].inner.param_groups[0].update(settings)
        for slot in slots:
            self._refresh(slot)
        stepped = [self._stepping.submit(slot.inner.step) for slot in slots]
        back = []
        for slot, future in zip(slots, stepped, strict=True):
            future.result(timeout=self._deadline_s)
            self._settle(slot)
            back.append(self._tier.fetch(slot.master_region, local_of(slot.weight), self._deadline_s))
        for slot, transfer in zip(slots, back, strict=True):
            transfer.wait()
            slot.seen = _version(slot.weight)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for slot in self._slots.values():
            slot.arriving.finish()
            slot.num_passes, slot.master.grad = 0, None

    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        return {**found, "state": {index: dict(state) for index, state in found["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "state": {}})
        self.state = _HostStates(self._slots)  # type: ignore[assignment]
        restore_states(self, state_dict)

    def held(self, weight: nn.Parameter) -> Mapping[str, Tensor]:
        """This rank's states of a weight where they lie, on the host; empty before the first step."""
        slot = self._slots[weight]
        return slot.inner.state.get(slot.master, {})

    def bytes_beside(self) -> int:
        """What it holds on the host beside its tier: states too small for a place there, or just loaded."""
        kept = [(slot, slot.inner.state.get(slot.master, {})) for slot in self._slots.values()]
        found = (value for slot, states in kept for name, value in states.items() if name not in slot.states)
        return sum(value.nbytes for value in found if isinstance(value, Tensor))

    def host_bytes(self) -> int:
        """What it holds on the host: masters, gradients and moments in its tier, and what is beside it."""
        return self._tier.stats().owners.get(OWNER, 0) + self.bytes_beside()

    def close(self) -> None:
        """Give the host memory back; the optimizer cannot step any more."""
        for hook in self._hooks:
            hook.remove()
        self._adding.close()
        self._stepping.shutdown()
        for slot in self._slots.values():
            for region in (slot.master_region, slot.grad_region, slot.next_region, *slot.states.values()):
                if region is not None:
                    self._tier.free(region)
        self._slots.clear()

    def _slot(self, weight: nn.Parameter, settings: dict[str, Any], make_inner: MakeInner) -> _Slot:
        local = local_of(weight)
        nbytes = max(1, local.numel() * local.element_size())
        region, grad_region = (self._tier.allocate(nbytes, OWNER) for _ in range(2))
        master = nn.Parameter(self._view(region, local), requires_grad=True)
        inner = make_inner([{"params": [master], **settings}])
        slot = _Slot(weight, master, region, grad_region, inner)
        self._refresh(slot)
        return slot

    def _view(self, region: Region, like: Tensor) -> Tensor:
        """A region's memory as a tensor shaped like `like`."""
        nbytes = like.numel() * like.element_size()
        return self._tier.memory_of(region)[:nbytes].view(like.dtype).view(like.shape)

    def _settle(self, slot: _Slot) -> None:
        """Move moments that were made or loaded elsewhere into the tier, where they stay."""
        states = slot.inner.state.get(slot.master, {})
        for name, value in states.items():
            if not isinstance(value, Tensor) or value.ndim == 0 or value.numel() == 0:
                continue
            region = slot.states.get(name)
            if region is None:
                region = slot.states[name] = self._tier.allocate(value.nbytes, OWNER)
            home = self._view(region, value)
            if home.data_ptr() != value.data_ptr():
                states[name] = home.copy_(value)

    def _refresh(self, slot: _Slot) -> None:
        """Whoever else wrote into the device's weight, a checkpoint for one, is followed."""
        if slot.seen != (now := _version(slot.weight)):
            self._tier.store(slot.master_region, local_of(slot.weight).contiguous(), self._deadline_s).finish()
            slot.seen = now

    def _take_gradient(self, weight: nn.Parameter) -> None:
        """Begin to move a fresh gradient to the host; the device's memory is free once it has left."""
        slot = self._slots[weight]
        assert weight.grad is not None
        local = local_of(weight.grad).contiguous()
        weight.grad = None
        # A transfer lets go of the device's memory when it is asked whether it is over.
        self._leaving = [transfer for transfer in self._leaving if not transfer.done()]
        slot.arriving.finish()
        if slot.num_passes == 0:
            slot.arriving = self._tier.store(slot.grad_region, local, self._deadline_s)
            self._leaving.append(slot.arriving)
        else:
            if slot.next_region is None:
                slot.next_region = self._tier.allocate(slot.grad_region.nbytes, OWNER)
            moved = self._tier.store(slot.next_region, local, self._deadline_s)
            self._leaving.append(moved)
            total, part = self._view(slot.grad_region, slot.master), self._view(slot.next_region, slot.master)

            def add() -> None:
                moved.finish()
                total.add_(part)

            slot.arriving = self._adding.submit(add, "adding up gradients", self._deadline_s)
        slot.num_passes += 1

    def _arrived(self) -> list[_Slot]:
        """The slots that have a gradient, once all are here."""
        slots = [slot for slot in self._slots.values() if slot.num_passes]
        for slot in slots:
            slot.arriving.finish()
            if slot.master.grad is None:
                slot.master.grad = self._view(slot.grad_region, slot.master)
        return slots


def _total_norm(slots: list[_Slot]) -> Tensor:
    """Of the whole gradient, over every rank that holds a part of it."""
    grads = [slot.master.grad for slot in slots if slot.master.grad is not None]
    meshes = {slot.weight.device_mesh for slot in slots if isinstance(slot.weight, DTensor)}
    if all(mesh.device_type == "cpu" for mesh in meshes):
        # Word for word what torch does without offload, so that the bits are the same.
        whole = [like_shard(grad, slot.weight) for grad, slot in zip(grads, slots, strict=True)]
        norm = torch.nn.utils.get_total_norm(whole, foreach=False)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
    (mesh,) = meshes
    square = torch.nn.utils.get_total_norm(grads).to(mesh.device_type) ** 2
    torch.distributed.all_reduce(square, group=mesh.get_group())
    return square.sqrt()


def needed_bytes(weights: Iterable[Tensor], num_ranks: int, kind: str, *, adds: bool) -> int:
    """Most bytes of tiers that a rank needs for whole `weights` cut by rows over `num_ranks`.

    `adds`: several passes come before a step, and gradients wait to be added.
    """
    total = 0
    for weight in weights:
        rows = -(-weight.shape[0] // num_ranks) if weight.ndim else 1
        shard = torch.empty(rows, *weight.shape[1:], dtype=weight.dtype, device="meta")
        nbytes, in_8_bits = shard.nbytes, kind == "adamw8bit" and in_blocks(shard)
        moments = [shard.numel(), 4 * shard.numel() // BLOCK] if in_8_bits else [max(nbytes, 4 * shard.numel())]
        total += sum(_pages(size) for size in [nbytes, nbytes, *moments, *moments, *([nbytes] if adds else [])])
    return total


def _pages(nbytes: int) -> int:
    return -(-max(1, nbytes) // DramTier.granularity) * DramTier.granularity


def _version(weight: nn.Parameter) -> tuple[int, int]:
    local = local_of(weight)
    return local.data_ptr(), local._version


class _HostStates(Mapping[nn.Parameter, "_HostState"]):
    """`optimizer.state` as others know it, read from and written to the optimizers on the host."""

    def __init__(self, slots: dict[nn.Parameter, _Slot]) -> None:
        self._slots = slots

    def __getitem__(self, weight: nn.Parameter) -> _HostState:
        return _HostState(self._slots[weight])

    def __iter__(self) -> Iterator[nn.Parameter]:
        return (weight for weight, slot in self._slots.items() if slot.inner.state.get(slot.master))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _HostState(MutableMapping[str, Tensor]):
    """The states of one weight: cut like the weight and on its mesh, one at a time, however they are kept."""

    def __init__(self, slot: _Slot) -> None:
        self._slot = slot
        self._states: defaultdict[Any, dict[str, Tensor]] = slot.inner.state

    def __getitem__(self, key: str) -> Tensor:
        weight, value = self._slot.weight, self._states[self._slot.master][key]
        if isinstance(weight, DTensor) and value.ndim:
            return like_shard(value.to(weight.device_mesh.device_type), weight)
        return value

    def __setitem__(self, key: str, value: Tensor) -> None:
        self._states[self._slot.master][key] = local_of(value).to("cpu")

    def __delitem__(self, key: str) -> None:
        del self._states[self._slot.master][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._states[self._slot.master])

    def __len__(self) -> int:
        return len(self._states[self._slot.master])
