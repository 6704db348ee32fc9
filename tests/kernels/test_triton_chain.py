"""A chain of steps in Triton equals its steps one by one in torch: compiled on a GPU, interpreted elsewhere.

The interpreter cuts bf16 numbers off where a GPU rounds them; fp16 stands for bf16 there.
"""

import os

import pytest
import torch
from tests.support.chains import DIM, GIVEN, HEADS, WANTED, WIDTH, block, draw, rows, with_weights

from farspan.kernels.chain.contract import Activation, Add, Gate, Multiply, Normalize, Rotate
from farspan.kernels.chain.reference import bind_chain_reference
from farspan.kernels.chain.triton import bind_chain_triton
from farspan.kernels.chain.triton_linear import MOST_ROWS
from farspan.kernels.rms_norm.contract import Kind

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = [pytest.param("cpu")] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
HALF = torch.float16 if INTERPRETED else torch.bfloat16
EPS = torch.finfo(HALF).eps
KINDS = [(Kind.SCALED, Activation.SILU), (Kind.ONE_MORE, Activation.GELU_TANH)]


@pytest.fixture(autouse=True)
def _poisoned():
    """torch.empty is full of NaN: what a kernel does not write, a test sees."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def all_of(steps, given, wanted, inputs, device):
    """What Triton gives, what torch gives, and the truth."""
    steps, inputs = with_weights(steps, HALF), [x.to(HALF) for x in inputs]
    chain = bind_chain_triton(with_weights(steps, device), given, wanted, HALF)
    got = [x.cpu() for x in chain(*(x.to(device) for x in inputs))]
    want = bind_chain_reference(steps, given, wanted)(*inputs)
    truth = bind_chain_reference(with_weights(steps, torch.float64), given, wanted)(*(x.double() for x in inputs))
    return zip(got, want, truth, strict=True)


@pytest.mark.parametrize("count", [0, 1, 2, 3, MOST_ROWS, MOST_ROWS + 1, 33])
@pytest.mark.parametrize(("kind", "activation"), KINDS)
@pytest.mark.parametrize("device", DEVICE)
def test_a_whole_block_in_few_kernels_is_as_exact_as_its_steps_in_torch(device, kind, activation, count) -> None:
    for ours, torchs, truth in all_of(block(kind, activation), GIVEN, WANTED, rows(count), device):
        assert ours.shape == torchs.shape
        assert ours.dtype == HALF
        assert float((ours.double() - truth).norm()) <= 1.2 * float((torchs.double() - truth).norm())
