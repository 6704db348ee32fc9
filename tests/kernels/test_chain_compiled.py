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


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", list(KERNELS))
def test_kernels_of_a_chain_compile_without_spilling_and_read_16_bytes_at_once(
    name, capability, tmp_path, monkeypatch
) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, constants = KERNELS[name]
    compiled = compile_kernel(kernel, constants, capability)
    ptx = compiled.asm["ptx"]
    assert compiled.metadata.shared <= 16 * 1024
    assert ".local" not in ptx
    # A product that is rounded stays one: fused with the sum behind it, it would not be. Before Hopper bf16 products
    # and sums are such operations too, with a zero or a one.
    assert capability < 90 or "fma.rn.bf16" not in ptx
    if name in WIDE:
        assert re.search(r"ld\.global(\.\w+)*\.v4\.b32", ptx)


def compile_kernel(name: str, constants: dict[str, Any], capability: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from farspan.kernels.chain import triton_linear, triton_rows

    kernel = getattr(triton_linear, name, None) or getattr(triton_rows, name)
    constants = {**constants, "TYPE": triton_rows.TYPES[torch.bfloat16]}
    signature, hints = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = "*bf16"
        else:
            signature[argument] = "fp32" if argument.startswith("eps") else "i32"
        # Tensors and rows that begin at multiples of 16, as torch's allocator gives them.
        if argument.endswith("_ptr") or argument.startswith("stride_"):
            hints[(index,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(kernel, signature, values, hints)
    options: dict[str, Any] = (
        {"num_warps": 4} if hasattr(triton_linear, name) else {"num_warps": 4, **triton_rows.OPTIONS}
    )
    if name == "_sum_kernel":
        options["num_warps"] = min(16, max(1, constants["BLOCK"] // 256))
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
