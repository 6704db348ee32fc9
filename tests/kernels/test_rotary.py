"""Angles of rotary positions by the compiled kernel equal the reference."""

import shutil

import pytest
import torch

from farspan.kernels.rotary.native import load_native
from farspan.kernels.rotary.reference import bind_angles_reference

FREQUENCIES = 1.0 / 10_000 ** (torch.arange(0, 64, 2).float() / 64)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_compiled_angles_equal_the_reference_to_a_rounding_of_few(count, scale) -> None:
    generator = torch.Generator().manual_seed(count)
    # Every other number of a longer row, as far as positions go.
    positions_T = torch.randint(1 << 20, (2 * count,), generator=generator)[::2]
    got, want = (bind(FREQUENCIES, scale)(positions_T) for bind in (load_native(), bind_angles_reference))
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape == (count, 64)
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-6)
        assert int((ours != theirs).sum()) <= ours.numel() // 50
