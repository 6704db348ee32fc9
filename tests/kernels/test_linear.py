"""Linear layers by the compiled kernel equal the reference, whoever is beside a row."""

import shutil
import subprocess
from dataclasses import replace

import pytest
import torch

from farspan.kernels.chain.native import load_native as load_chain
from farspan.kernels.linear import dispatch, native
from farspan.kernels.linear.native import load_native
from farspan.kernels.linear.reference import bind_linear_reference

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
# Rows, outputs, inputs: whole vectors and not, few and many rows, more than a cache holds, fewer outputs than a group.
SHAPES = [(1, 64, 32), (1, 9, 51), (2, 3, 8), (3, 100, 767), (4, 7, 33), (7, 50, 64), (8, 30, 100)]
SHAPES += [(1, 1001, 96), (2, 1003, 4000), (9, 30, 100), (17, 8, 64), (130, 65, 1000), (5, 1, 1), (0, 4, 8)]
SHAPES += [(129, 16, 64), (300, 300, 100), (1030, 40, 33), (144, 70, 17001)]


@pytest.fixture(params=["as it is", "no tiles"], autouse=True)
def processor(request, monkeypatch):
    """This processor, and where it multiplies by matrix tiles also as one that does not."""
    if request.param == "no tiles" and shutil.which("g++") is not None:
        bind = load_chain()
        if not bind.tiled:
            pytest.skip("this processor has no matrix tiles")
        monkeypatch.setattr(native, "load_chain", lambda: replace(bind, tiled=False))
        native.load_native.cache_clear()
        yield request.param
        native.load_native.cache_clear()
    else:
        yield request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def draw(rows, outs, ins):
    generator = torch.Generator().manual_seed(rows * outs + ins)
    return [torch.randn(size, generator=generator).bfloat16() for size in ((rows, ins), (outs, ins), (outs,))]


@needs_compiler
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_compiled_linear_layer_equals_the_reference(shape, biased, num_threads, threads) -> None:
    threads(num_threads)
    x, w, b = draw(*shape)
    bias = b if biased else None
    got, want = load_native()(w, bias)(x), bind_linear_reference(w, bias)(x)
    assert got.dtype == torch.bfloat16
    # One rounding to bf16 apart, where the fp32 sums, longer ones by more, differ in their last bits.
    torch.testing.assert_close(got.float(), want.float(), rtol=2**-7, atol=1e-5 + 1e-8 * shape[2])


@needs_compiler
def test_a_row_gives_the_same_bits_alone_and_among_others(threads) -> None:
    x, w, b = draw(70, 100, 767)
    whole = load_native()(w, b)(x)
    threads(1)
    alone = torch.cat([load_native()(w, b)(x[i : i + 1]) for i in range(len(x))])
    some = [torch.cat([load_native()(w, b)(part) for part in x.split(n)]) for n in range(2, 10)]
    assert torch.equal(alone, whole)
    assert all(torch.equal(each, whole) for each in some)


@needs_compiler
def test_rows_and_weights_that_lie_apart_are_read_where_they_lie() -> None:
    x, w, b = draw(6, 40, 64)
    spread = torch.full((12, 80), float("nan")).bfloat16()
    spread[::2, :64] = x
    weights = torch.full((40, 100), float("nan")).bfloat16()
    weights[:, :64] = w
    got = load_native()(weights[:, :64], b)(spread[::2, :64])
    assert torch.equal(got, load_native()(w, b)(x))
    assert torch.equal(load_native()(w, b)(x.T.contiguous().T), got)


@needs_compiler
def test_numbers_that_are_none_stay_none_and_touch_no_other_row() -> None:
    x, w, b = draw(4, 24, 40)
    x[1, 3] = float("nan")
    got = load_native()(w, b)(x)
    assert got[1].isnan().all()
    assert got[[0, 2, 3]].isfinite().all()


@needs_compiler
def test_a_process_that_gives_torch_matrix_tiles_gives_them_to_the_kernel(processor) -> None:
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, timeout=60, check=True).stdout
    if processor != "as it is" or int(version.split(".")[0]) < 11 or not torch.cpu._init_amx():
        pytest.skip("no matrix tiles here")
    assert load_chain().tiled


@pytest.mark.parametrize("chosen", [None, "compiled"])
def test_linear_layers_leave_torch_where_chains_on_a_cpu_do(chosen, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(dispatch, "choose_chain", lambda *asks: asked.append(asks) or chosen)
    monkeypatch.setattr(dispatch, "load_native", lambda: bind_linear_reference)
    assert dispatch.choose_linear("cpu", torch.bfloat16) is (bind_linear_reference if chosen else None)
    assert dispatch.choose_linear("cuda", torch.bfloat16) is None
    assert asked == [("cpu", torch.bfloat16)]
