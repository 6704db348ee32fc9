"""Attention over pages in Triton against the plain-torch reference: compiled on a GPU, interpreted elsewhere.

The interpreter multiplies no bf16 matrices; fp16 stands for it there.
"""

import os
from dataclasses import replace

import pytest
import torch
from tests.support.paged_cases import CASES, Case, assert_close, make

from farspan.kernels.paged_decode.launch import Launch
from farspan.kernels.paged_decode.reference import attend_pages_reference
from farspan.kernels.paged_decode.triton import attend_pages_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HALF = torch.float16 if INTERPRETED else torch.bfloat16
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = [torch.float64, HALF] if INTERPRETED else [HALF]
DEVICE = [pytest.param("cpu")] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
# Small tiles and few rows, so that short contexts are cut into many pieces and blocks.
LAUNCH = Launch(tokens=32, rows=6, num_programs=5, merged_pieces=2)


@pytest.fixture(autouse=True)
def _poisoned():
    """torch.empty is full of NaN: what a kernel does not write, a test sees."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in CASES] + [(case, dtype) for case in (CASES[4], CASES[8]) for dtype in DTYPES],
    ids=str,
)
@pytest.mark.parametrize("device", DEVICE)
def test_attention_over_pages_in_triton_equals_the_reference_and_never_reads_hidden_slots(device, case, dtype) -> None:
    inputs, rule = make(case, device, dtype)
    got = attend_pages_triton(*inputs, **rule, launch=LAUNCH)
    assert_close(TOLERANCE[dtype], got, attend_pages_reference(*inputs, **rule))


@pytest.mark.parametrize("num_programs", [1, 3, 64])
@pytest.mark.parametrize("device", DEVICE)
def test_any_number_of_programs_gives_the_same_result(device, num_programs) -> None:
    inputs, rule = make(Case((96, 0, 5, 33), queries=2), device, torch.float32)
    got = attend_pages_triton(*inputs, **rule, launch=replace(LAUNCH, num_programs=num_programs))
    assert_close(1e-5, got, attend_pages_reference(*inputs, **rule))


@pytest.mark.parametrize("device", DEVICE)
def test_queries_and_tables_with_strange_strides_and_types_give_the_same_bits(device) -> None:
    (q, keys, values, tables, lengths), rule = make(Case((40, 21, 64)), device, torch.float32)
    want = attend_pages_triton(q, keys, values, tables, lengths, **rule, launch=LAUNCH)
    strange = (q.transpose(1, 2).contiguous().transpose(1, 2), keys, values, tables.T.contiguous().T.long())
    for a, b in zip(attend_pages_triton(*strange, lengths.long(), **rule, launch=LAUNCH), want, strict=True):
        assert torch.equal(a, b)
