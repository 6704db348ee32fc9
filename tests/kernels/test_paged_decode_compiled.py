"""The Triton kernels over pages through Triton's compiler, which needs no GPU."""

import os
import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is installed on Linux only")

# What one thread block may use on GPUs of compute capability 8.0, 8.6 and 9.0, in bytes.
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}


@pytest.mark.parametrize(
    ("query_rows", "head_dim", "capability"), [(4, 128, 80), (4, 128, 90), (64, 256, 86), (1, 64, 90)]
)
def test_the_kernel_over_pages_compiles_to_matrix_instructions_and_fits_shared_memory(
    query_rows, head_dim, capability, tmp_path, monkeypatch
) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_pieces(query_rows, head_dim, capability)
    assert compiled.metadata.shared <= SHARED_BYTES[capability]
    assert any(name in compiled.asm["ptx"] for name in ("mma.sync", "wgmma.mma_async"))
    # Keys of the next tile are on their way while one is computed.
    assert "cp.async" in compiled.asm["ptx"]


@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_the_merge_of_pieces_compiles_and_keeps_a_piece_in_registers(head_dim, tmp_path, monkeypatch) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from farspan.kernels.paged_decode.triton import _merge_pieces_kernel

    line = _line(4, head_dim)
    launch = line.pop("launch")
    constants = {**line, "BLOCK_P": launch.merged_pieces, "PDL": True}
    compiled = _compile(_merge_pieces_kernel, constants, 90, launch.merge_warps, 1)
    assert "ex2.approx" in compiled.asm["ptx"]
    assert not re.search(r"\b(LDL|STL)\b", compiled.asm["sass"])
    assert waits_first(compiled.asm["ptx"])


def test_attention_launched_early_waits_before_it_reads_lengths_pages_or_queries(tmp_path, monkeypatch) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_pieces(4, 128, 90, early=True)
    assert compiled.metadata.shared <= SHARED_BYTES[90]
    assert waits_first(compiled.asm["ptx"])


def test_new_tokens_are_written_after_the_wait(tmp_path, monkeypatch) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from farspan.kernels.paged_decode.triton_write import _write_kernel

    constants = {"GROUPS": 8, "D": 128, "C": 128, "BLOCK_K": 1024, "BLOCK_V": 1024, "PDL": True}
    assert waits_first(_compile(_write_kernel, constants, 90, 4, 1).asm["ptx"])


def waits_first(ptx: str) -> bool:
    """Whether every program waits for the kernel before, then lets the next one start, then reads and writes."""
    before, _, behind = ptx.partition("griddepcontrol.wait")
    touches = re.compile(r"\b(ld|st)\.global|cp\.async|\bret;|\bbra\b")
    body = before.split("{", 1)[1]
    return not touches.search(body) and "griddepcontrol.launch_dependents" in behind and bool(touches.search(behind))


def compile_pieces(query_rows: int, head_dim: int, capability: int, early: bool = False) -> Any:
    import triton.language as tl

    from farspan.kernels.paged_decode.triton import _pieces_kernel

    constants = _line(query_rows, head_dim)
    launch = constants.pop("launch")
    constants |= {"SLOTS": 16, "D": head_dim, "BLOCK_D": head_dim, "BLOCK_R": launch.padded(launch.rows)}
    constants |= {"CAUSAL": True, "WEIGHTED": False, "SCALE": 0.1, "CAP": 0.0, "WIDE": tl.float32, "PDL": early}
    return _compile(_pieces_kernel, constants, capability, launch.num_warps, launch.num_stages)


def _line(query_rows: int, head_dim: int) -> dict[str, Any]:
    from farspan.kernels.paged_decode.launch import choose_launch

    launch = choose_launch(head_dim, 2, query_rows, torch.device("cpu"))
    return {
        "launch": launch, "TOKENS": launch.tokens, "QUERIES": 1, "WINDOWED": False, "SEGMENTS": 8, "BLOCK_B": 64,
        "ROWS": launch.rows, "GROUP": query_rows, "GROUPS": 8, "BLOCKS": 1, "C": head_dim, "BLOCK_C": head_dim,
    }  # fmt: skip


def _compile(kernel: Any, constants: dict[str, Any], capability: int, num_warps: int, num_stages: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    halves = ("q_ptr", "k_ptr", "v_ptr") if "BLOCK_R" in constants else ("out_ptr",)
    signature, hints = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in ("table_ptr", "lengths_ptr"):
            signature[argument] = "*i32"
        elif argument.endswith("_ptr"):
            signature[argument] = "*bf16" if argument in halves else "*fp32"
        else:
            signature[argument] = "i32"
        # Tensors and rows that begin at multiples of 16, as torch's allocator gives them.
        if argument.endswith("_ptr") or (argument.startswith("stride_") and argument[7] in "qkv"):
            hints[(index,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    return triton.compile(
        ASTSource(kernel, signature, values, hints),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, "launch_pdl": constants["PDL"]},
    )
