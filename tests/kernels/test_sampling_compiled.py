"""The Triton kernels that choose tokens through Triton's compiler, which needs no GPU."""

import os
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is installed on Linux only")

CONSTANTS = {"S": 32, "BLOCK_S": 32, "BLOCK_V": 4096, "TELLS": True}


@pytest.mark.parametrize(("capability", "logits"), [(80, "*fp32"), (90, "*bf16")])
@pytest.mark.parametrize("name", ["_tops_kernel", "_sums_kernel", "_choose_kernel"])
def test_kernels_that_choose_compile_for_gpus_and_are_no_part_of_a_chain_that_comes_up_early(
    name, logits, capability, tmp_path, monkeypatch
) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_kernel(name, logits, capability)
    assert compiled.metadata.shared <= 16 * 1024
    assert "griddepcontrol" not in compiled.asm["ptx"], "nothing here waits as a kernel that comes up early must"


def compile_kernel(name: str, logits: str, capability: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from farspan.kernels.sampling import triton as kernels

    kernel = getattr(kernels, name)
    types = {"x_ptr": logits, "firsts_ptr": "*i64", "tokens_ptr": "*i64", "told_ptr": "*i1"}
    signature = {
        argument: "constexpr"
        if argument in CONSTANTS
        else types.get(argument, "*fp64")
        if "_ptr" in argument
        else "i32"
        for argument in kernel.arg_names
    }
    values = {(kernel.arg_names.index(key),): value for key, value in CONSTANTS.items() if key in kernel.arg_names}
    return triton.compile(
        ASTSource(kernel, signature, values, {}), target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}
    )
