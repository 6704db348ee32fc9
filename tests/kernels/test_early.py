"""Which kernels are launched early, and how much of a weight is asked for ahead."""

from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton", reason="Triton is installed on Linux only")

from farspan.kernels import early
from farspan.kernels.early import bytes_ahead, early_on

CUDA, NO = torch.device("cuda"), {"PDL": False}


@pytest.fixture(autouse=True)
def _forgotten():
    early._can_be_early.cache_clear()
    yield
    early._can_be_early.cache_clear()


@pytest.mark.parametrize(
    ("hip", "capability", "possible"),
    [(None, (9, 0), True), (None, (12, 0), True), (None, (8, 9), False), ("6.4", (9, 4), False)],
)
def test_kernels_are_launched_early_on_nvidia_gpus_since_hopper(hip, capability, possible, monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert early_on(CUDA) == ({"PDL": True, "launch_pdl": True} if possible else NO)
    assert early_on(CUDA, wanted=False) == early_on(torch.device("cpu")) == NO


def test_a_triton_that_does_not_know_of_it_gets_no_option_it_would_refuse(monkeypatch) -> None:
    @dataclass
    class OlderOptions:
        num_warps: int = 4

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(early, "CUDAOptions", OlderOptions)
    assert early_on(CUDA) == NO


def test_whole_pieces_of_a_row_are_asked_for_and_nothing_of_rows_at_odd_places() -> None:
    w_NK = torch.zeros(6, 1032, dtype=torch.bfloat16)
    assert [bytes_ahead(w_NK, most) for most in (4096, 100, 0)] == [2064, 96, 0]
    assert bytes_ahead(w_NK[:, :12], 4096) == 16
    assert bytes_ahead(w_NK[0], 4096) == 2064
    assert bytes_ahead(w_NK[:, 1:], 4096) == bytes_ahead(torch.zeros(6, 51, dtype=torch.bfloat16), 4096) == 0
