"""Triton is interpreted or compiled, and decides when it is imported: its tests run where one of the two is right."""

import os

import torch

# Without a GPU, test_interpreted.py runs these files in a process of their own.
_TRITON = [
    "test_triton_attention.py",
    "test_triton_chain.py",
    "test_triton_merge.py",
    "test_triton_paged_decode.py",
    "test_triton_sampling.py",
    "test_triton_write.py",
]
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else _TRITON
