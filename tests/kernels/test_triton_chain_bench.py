"""The bench of chains, in the interpreter and in small; and its contender for some rows. On a GPU: as it is."""

import os
from dataclasses import replace

import pytest
import torch
from tests.support.chains import draw

from farspan.kernels.chain import bench
from farspan.kernels.chain.bench import APART, EARLY, Shape, bench_chain, best_tiles, main
from farspan.kernels.chain.bench_contender import multiply_by_shares, num_shares
from farspan.kernels.chain.triton_linear import MOST_ROWS, Tiles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = [pytest.param("cpu")] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
# The interpreter does not multiply bf16 matrices.
SMALL = Shape(
    width=128, inner=128, groups=4, dim=16, layers=1, rows=(1,), linear_rows=(1, 3), summed_bytes=1024,
    dtype=torch.float16,
)  # fmt: skip


@pytest.mark.parametrize("device", DEVICE)
def test_layers_and_products_are_measured_against_a_sum_and_each_other(device, monkeypatch) -> None:
    monkeypatch.setattr(bench, "CHOSEN", Tiles(outputs=64))
    monkeypatch.setattr(bench, "_OTHER_TILES", (Tiles(outputs=32),))
    rows = bench_chain(torch.device(device), SMALL)
    assert not [row["wrong"] for row in rows if "wrong" in row]
    assert all(row["seconds"] > 0 and row["bytes_per_second"] > 0 and row["of_sum"] > 0 for row in rows)
    layers = [row for row in rows if row["what"] == "layer of 1"]
    assert [(row["rows"], row["contestant"]) for row in layers] == [(1, EARLY), (1, APART)]
    names = ["q, k and v", "o", "gate and up", "down"]
    assert list(dict.fromkeys(row["what"] for row in rows[len(layers) :])) == names
    assert all(sum(row["what"] == name and row["rows"] == 1 for row in rows) == 3 for name in names)
    assert list(best_tiles(rows)) == names


@pytest.mark.parametrize("device", DEVICE)
def test_who_gives_something_else_has_no_time(device, monkeypatch) -> None:
    monkeypatch.setattr(bench, "multiply_by_shares", lambda x_TK, w_NK: x_TK @ w_NK.T * 1.1)
    rows = bench_chain(torch.device(device), replace(SMALL, rows=(), linear_rows=(3,)))
    assert [("wrong" in row, "seconds" in row) for row in rows] == [(False, True), (True, False)] * 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_one_sentence_says_that_it_needs_one() -> None:
    with pytest.raises(SystemExit, match="this bench measures a GPU and torch sees none"):
        main()


@pytest.mark.parametrize("count", [MOST_ROWS + 1, 37])
@pytest.mark.parametrize(("outputs", "inputs"), [(128, 256), (256, 192)])
@pytest.mark.parametrize("device", DEVICE)
def test_products_by_shares_equal_one_product(device, outputs, inputs, count) -> None:
    x_TK, w_NK = (draw(*size).to(device, torch.float16) for size in ((count, inputs), (outputs, inputs)))
    want = (x_TK.double() @ w_NK.double().T).to(torch.float16)
    torch.testing.assert_close(multiply_by_shares(x_TK, w_NK), want, rtol=2e-3, atol=2e-2)


def test_shares_are_as_many_as_processors_need_and_tiles_allow() -> None:
    assert [num_shares(*size) for size in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))] == [4, 4, 1, 4]
    assert num_shares(384, 192) == 1
