"""The Triton kernels of a chain through Triton's compiler, which needs no GPU."""

import os
import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is installed on Linux only")

TILE = {"BLOCK_N": 4, "BLOCK_K": 1024, "ROWS": 1}
SUM = {"SIZE": 4096, "BLOCK": 4096, "ADDED": True, "BEFORE": 2, "AFTER": 1}
TURN = {"D": 128, "HALF": 64, "BLOCK_H": 4, "BLOCK_R": 64, "BLOCK_P": 1}
# As in a Llama of 8 billion weights, in each of their forms.
KERNELS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("_multiply_kernel", {**TILE, "N": 4096, "K": 14336, "BIASED": False, "ADDED": True}),
    "two rows": ("_multiply_kernel", {**TILE, "N": 6144, "K": 4096, "BIASED": True, "ADDED": False, "ROWS": 2}),
    "odd sizes": ("_multiply_kernel", {**TILE, "N": 51, "K": 70, "BIASED": True, "ADDED": True, "BLOCK_K": 128}),
    "gated": ("_multiply_gated_kernel", {**TILE, "N": 14336, "K": 4096, "ACTIVATION": 0}),
    "gated two rows": ("_multiply_gated_kernel", {**TILE, "N": 14336, "K": 4096, "ACTIVATION": 1, "ROWS": 2}),
    "sum": ("_sum_kernel", SUM),
    "scaled sum": ("_sum_kernel", {**SUM, "BEFORE": 1}),
    "norm": ("_sum_kernel", {**SUM, "SIZE": 128, "BLOCK": 128, "ADDED": False, "BEFORE": 0, "AFTER": 2}),
    "turn": ("_turn_kernel", {**TURN, "HEADS": 32, "OTHERS": 8, "NORM": 0}),
    "normed turn": ("_turn_kernel", {**TURN, "HEADS": 32, "OTHERS": 8, "NORM": 1}),
    "turn alone": ("_turn_kernel", {**TURN, "HEADS": 8, "OTHERS": 0, "NORM": 2}),
    "partial turn": ("_turn_kernel", {**TURN, "HEADS": 3, "OTHERS": 0, "NORM": 2, "HALF": 12, "BLOCK_P": 128}),
    "gate": ("_gate_kernel", {"SIZE": 14336, "TILE": 1024, "ACTIVATION": 1}),
}
# Weights are read in 16 bytes a thread, numbers of rows in as many wherever a row has enough of them.
WIDE = ("linear", "two rows", "gated", "gated two rows", "sum", "scaled sum", "gate")


# Weights that each asks the cache for before it waits for rows.
ASKED = {"linear": 1, "two rows": 1, "gated": 2, "gated two rows": 2, "sum": 2, "scaled sum": 2, "norm": 1}
ASKED |= {"normed turn": 2, "turn alone": 2, "partial turn": 2}


@pytest.fixture(autouse=True)
def _compiled_anew(tmp_path, monkeypatch):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", list(KERNELS))
def test_kernels_of_a_chain_compile_without_spilling_and_read_16_bytes_at_once(name, capability) -> None:
    compiled = compile_kernel(*KERNELS[name], capability)
    check(name, compiled, capability)
    assert "griddepcontrol" not in compiled.asm["ptx"]


def check(name: str, compiled: Any, capability: int) -> None:
    ptx = compiled.asm["ptx"]
    assert compiled.metadata.shared <= 16 * 1024
    assert ".local" not in ptx
    # A product that is rounded stays one: fused with the sum behind it, it would not be. Before Hopper bf16 products
    # and sums are such operations too, with a zero or a one.
    assert capability < 90 or "fma.rn.bf16" not in ptx
    if name in WIDE:
        assert re.search(r"ld\.global(\.\w+)*\.v4\.b32", ptx)


@pytest.mark.parametrize("name", list(KERNELS))
def test_a_kernel_launched_early_asks_for_weights_then_waits_and_only_then_touches_memory_and_lets_others_start(
    name,
) -> None:
    compiled = compile_kernel(*KERNELS[name], 90, early=True)
    check(name, compiled, 90)
    assert compiled.metadata.launch_pdl
    # In what Triton makes, and in what becomes of it on the device.
    words = {
        "ptx": ("griddepcontrol.wait", "griddepcontrol.launch_dependents", "cp.async.bulk.prefetch", "ld.global"),
        "sass": ("ACQBULK", "PREEXIT", "UBLKPF", "LDG"),
    }
    for form, (wait, let_start, ask, read) in words.items():
        text = compiled.asm[form]
        assert [text.count(word) for word in (wait, let_start, ask)] == [1, 1, ASKED.get(name, 0)]
        before, behind = text.split(wait)
        assert before.count(ask) == ASKED.get(name, 0)
        assert let_start in behind
        assert not re.search(r"\b(ld|st|red|atom)\.global|\b(LDG|STG|LD|ST|RED|ATOMG)\.E", before)
        assert read in behind
        # Programs that have nothing to do wait as well.
        assert not re.search(r"\bret;|\bEXIT\b", before)
    assert "bra" not in compiled.asm["ptx"].split("griddepcontrol.wait")[0].split("{", 1)[1]


@pytest.mark.parametrize("columns", [16, 64])
def test_the_contender_for_some_rows_multiplies_by_matrix_units_while_weights_are_on_their_way(columns) -> None:
    constants = {"N": 4096, "SHARE": 1024, "BLOCK_N": 128, "BLOCK_K": 64, "BLOCK_T": columns}
    compiled = compile_kernel("_shares_kernel", constants, 90)
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert "cp.async" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 227 * 1024


def compile_kernel(name: str, constants: dict[str, Any], capability: int, early: bool = False) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from farspan.kernels.chain import bench_contender, triton_linear, triton_rows

    (room,) = [room for room in (triton_linear, triton_rows, bench_contender) if name in vars(room)]
    kernel = getattr(room, name)
    given = {**constants, "TYPE": triton_rows.TYPES[torch.bfloat16], "PDL": early}
    constants = {key: value for key, value in given.items() if key in kernel.arg_names}
    if "AHEAD" in kernel.arg_names:
        # Rows of 70 numbers begin at odd places.
        size = constants.get("K") or constants.get("SIZE") or constants["D"]
        constants["AHEAD"] = min(4096, 2 * size) if early and size % 8 == 0 else 0
    signature, hints = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = "*fp32" if argument == "part_ptr" else "*bf16"
        else:
            signature[argument] = "fp32" if argument.startswith("eps") else "i32"
        # Tensors and rows that begin at multiples of 16, as torch's allocator gives them.
        if argument.endswith("_ptr") or argument.startswith("stride_"):
            hints[(index,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(kernel, signature, values, hints)
    options: dict[str, Any] = {"num_warps": 4}
    if room is triton_rows:
        options |= triton_rows.OPTIONS
    if room is bench_contender:
        options["num_stages"] = 8
    if name == "_sum_kernel":
        options["num_warps"] = min(16, max(1, constants["BLOCK"] // 256))
    if early:
        options["launch_pdl"] = True
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
