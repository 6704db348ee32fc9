"""The Triton kernels on a machine without a GPU: in Triton's interpreter, and through its compiler."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is installed on Linux only")

HERE = Path(__file__).parent
RULES = {"causal": (0, None, None), "window and soft cap": (0, 4096, 30.0)}
# What one thread block may use on GPUs of compute capability 8.0 and 9.0, in bytes.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}


@pytest.mark.long
def test_interpreted_triton_kernels_equal_the_references() -> None:
    """Every case of test_triton_*.py, in a process whose Triton is the interpreter."""
    files = sorted(str(path) for path in HERE.glob("test_triton_*.py"))
    # One thread: the interpreter is Python, and threads of a busy machine only slow its small products.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None, run.stdout[-2000:]
    assert int(passed[1]) >= 40, "cases went missing"


@pytest.mark.parametrize(
    ("rule", "capability"), [("window and soft cap", 80), ("window and soft cap", 90), ("causal", 90)]
)
@pytest.mark.parametrize("name", ["_forward_kernel", "_dq_kernel", "_dkv_kernel"])
def test_attention_kernels_compile_to_matrix_instructions_and_fit_shared_memory(
    name, rule, capability, tmp_path, monkeypatch
) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_kernel(name, rule, capability)
    assert compiled.metadata.shared <= SHARED_BYTES[capability]
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in compiled.asm["ptx"]


def compile_kernel(name: str, rule_name: str, capability: int, dim: int = 128) -> Any:
    """A bf16 kernel compiled down to machine code, which needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from farspan.kernels.attention import triton as forward
    from farspan.kernels.attention import triton_backward as backward
    from farspan.kernels.attention.launch import Rule, choose_tiles

    kernel = getattr(forward if name == "_forward_kernel" else backward, name)
    offset, window, softcap = RULES[rule_name]
    tiles = choose_tiles(dim, 2, backward=name != "_forward_kernel")
    rule = Rule(0.1, offset, window, softcap)
    constants = {"GROUP": 4, "D": dim, "C": dim, "PACKED": True}
    constants |= rule.constants(torch.bfloat16) | tiles.constants(dim, dim)
    signature, hints = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument == "table_ptr":
            signature[argument] = "*i32"
        elif argument.endswith("_ptr"):
            signature[argument] = "*fp32" if argument in ("lse_ptr", "delta_ptr") else "*bf16"
        else:
            signature[argument] = "i32"
        # Tensors and rows that begin at multiples of 16, as torch's allocator gives them.
        if argument.endswith("_ptr") or (argument.startswith("stride_") and argument[7] not in "le"):
            hints[(index,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    return triton.compile(
        ASTSource(kernel, signature, values, hints),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tiles.num_warps, "num_stages": tiles.num_stages},
    )
