"""Measure in seconds what a machine really reaches: products, attention, copies. `save_calibration` keeps it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from farspan.errors import PlanError
from farspan.kernels.attention.dispatch import choose_backend
from farspan.kernels.attention.limits import Ask
from farspan.parallel.exchange import Exchange
from farspan.plan.machine import DEVICES, Device, Efficiency, Machine, sheet_of

_REPEATS = 5


def this_machine() -> Machine:
    """The GPUs of this machine, or its processors, with measured speeds.

    Raises:
        PlanError: a GPU whose data sheet farspan does not know.
    """
    if torch.cuda.is_available():
        return _gpus()
    return cpu_machine()


def cpu_machine(processes: int = 1) -> Machine:
    """This machine's processors as `processes` devices that share its memory and its speed."""
    cpu = torch.device("cpu")
    flops, bandwidth = _gemm(cpu, 768, torch.float32), _copy(cpu, 1 << 26)
    attention = _attention(cpu, 1024, 8, 64, torch.float32)
    memory = _available_bytes()
    share = 1 / processes
    device = Device(
        name="cpu",
        bytes=memory * share,
        flops=flops * share,
        memory_bandwidth=bandwidth * share,
        # Processes hand messages over through memory: once written, once read.
        node_bandwidth=bandwidth * share / 2,
        host_link=bandwidth * share / 2,
    )
    shares = Efficiency(
        gemm=1.0, attention=attention / flops, memory=1.0, node=1.0, host_link=1.0, launch_s=2e-6, measured=True
    )
    # There is no slower tier than the memory the processors compute in.
    return Machine(device=device, devices_per_node=processes, reserved_bytes=0.0, efficiency=shares)


def all_to_all_bandwidth(exchange: Exchange, device: torch.device, num_bytes: int = 1 << 26) -> float:
    """Bytes a second one rank sends to the others of `exchange`. Collective."""
    rows = torch.empty(exchange.num_ranks, num_bytes // exchange.num_ranks, dtype=torch.uint8, device=device)
    best = _best(lambda: exchange.all_to_all(rows), device)
    return rows.numel() * (exchange.num_ranks - 1) / exchange.num_ranks / best


def with_exchange(machine: Machine, bytes_per_s: float) -> Machine:
    """`machine` with a measured all-to-all."""
    return replace(machine, efficiency=replace(machine.efficiency, node=bytes_per_s / machine.device.node_bandwidth))


def _gpus() -> Machine:
    gpu, found = torch.device("cuda"), torch.cuda.get_device_properties(0)
    sheet = _sheet(found.name, found.total_memory)
    device = replace(sheet, bytes=float(found.total_memory))
    small = torch.zeros(1, device=gpu)
    shares = Efficiency(
        gemm=_gemm(gpu, 8192, torch.bfloat16) / sheet.flops,
        attention=_attention(gpu, 16_384, 16, 128, torch.bfloat16) / sheet.flops,
        memory=_copy(gpu, 1 << 30) / sheet.memory_bandwidth,
        node=_peer_copy(1 << 28) / sheet.node_bandwidth if torch.cuda.device_count() > 1 else Efficiency().node,
        host_link=_host_copy(gpu, 1 << 28) / sheet.host_link,
        launch_s=_best(lambda: [small.add_(1) for _ in range(200)], gpu) / 200,
        measured=True,
    )
    host = float(_available_bytes())
    return Machine(
        device=device,
        devices_per_node=torch.cuda.device_count(),
        host_bytes=host,
        host_bandwidth=2 * _copy(torch.device("cpu"), 1 << 28),
        efficiency=shares,
    )


def _sheet(name: str, memory: int) -> Device:
    sheet = sheet_of(name, memory)
    if sheet is None:
        raise PlanError(f"no data sheet for {name}; known devices are {', '.join(DEVICES)}")
    return sheet


def _gemm(device: torch.device, size: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * size**3 / _best(lambda: a @ b, device)


def _attention(device: torch.device, tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> float:
    q, k, v = (torch.randn(tokens, heads, head_dim, device=device, dtype=dtype) for _ in range(3))
    attend = choose_backend(Ask.of(q, v)).packed_forward
    best = _best(lambda: attend(q, k, v, bounds=(0, tokens), scale=head_dim**-0.5), device)
    return 2.0 * tokens * tokens / 2 * heads * 2 * head_dim / best


def _copy(device: torch.device, num_bytes: int) -> float:
    """Bytes read and written a second."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * num_bytes / _best(lambda: target.copy_(source), device)


def _host_copy(gpu: torch.device, num_bytes: int) -> float:
    host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(num_bytes, dtype=torch.uint8, device=gpu)
    out = _best(lambda: there.copy_(host, non_blocking=True), gpu)
    back = _best(lambda: host.copy_(there, non_blocking=True), gpu)
    return num_bytes / max(out, back)


def _peer_copy(num_bytes: int) -> float:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=first)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=second)
    return num_bytes / _best(lambda: target.copy_(source, non_blocking=True), first)


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few calls; the first one is not counted."""
    times = []
    for _ in range(_REPEATS + 1):
        _wait(device)
        started = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _available_bytes() -> int:
    """Memory this process may have: of the machine, or less where its control group says so."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total
