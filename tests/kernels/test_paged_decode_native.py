"""The compiled CPU kernel over pages equals the reference."""

import shutil

import pytest
import torch
from tests.support.paged_cases import CASES, Case, assert_close, make

from farspan.kernels.paged_decode.native import load_native
from farspan.kernels.paged_decode.reference import attend_pages_reference

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*CASES, Case((700, 3, 0, 257, 64), heads=12, groups=3, queries=8)], ids=str)
def test_the_compiled_kernel_equals_the_reference_and_never_reads_hidden_slots(
    case, dtype, num_threads, threads
) -> None:
    threads(num_threads)
    inputs, rule = make(case, "cpu", dtype)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 3e-3}[dtype]
    want = attend_pages_reference(*(x.float() if x.is_floating_point() else x for x in inputs), **rule)
    got = load_native()(*inputs, **rule)
    assert_close(tolerance, got, (want[0].to(dtype), want[1]))


@needs_compiler
def test_the_number_of_threads_moves_no_more_than_rounding_and_repeats_its_bits(threads) -> None:
    inputs, rule = make(Case((900, 40, 333)), "cpu", torch.float32)
    runs = {}
    for count in (1, 2, 5):
        threads(count)
        runs[count] = [load_native()(*inputs, **rule) for _ in range(3)]
        for again in runs[count][1:]:
            assert all(torch.equal(a, b) for a, b in zip(again, runs[count][0], strict=True))
    for count in (2, 5):
        assert_close(1e-6, runs[count][0], runs[1][0])


@needs_compiler
def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    inputs, rule = make(Case((300, 40)), "cpu", torch.float32)
    inputs[0].mul_(200.0)
    assert_close(1e-5, load_native()(*inputs, **rule), attend_pages_reference(*inputs, **rule))


@needs_compiler
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_many_queries_of_a_row_equal_the_reference_too(causal, softcap) -> None:
    case = Case((700, 3, 0, 257, 64), heads=12, groups=3, queries=20, causal=causal, softcap=softcap)
    inputs, rule = make(case, "cpu", torch.bfloat16)
    want = attend_pages_reference(*(x.float() if x.is_floating_point() else x for x in inputs), **rule)
    got = load_native()(*inputs, **rule)
    assert_close(6e-3, got, (want[0].bfloat16(), want[1]))
