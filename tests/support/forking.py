"""Processes that need not import torch and transformers first: forked from one that has.

Its environment is that of the test session's start; nothing in it has run a parallel region, so a fork is whole.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

# Where one cannot be imported the forked process does it, or fails, itself.
_IMPORTED = [
    "torch",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "farspan.train.build",
    "farspan.engine.engine",
    "tests.support.ranks",
]


def forking() -> ForkServerContext:
    """The context that starts them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context
