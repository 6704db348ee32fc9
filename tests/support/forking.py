"""Processes that need not import torch and transformers first: forked from one that has.

Its environment is that of the test session's start; nothing in it has run a parallel region, so that nobody misses a
thread. Forked processes agree on the hashes of strings, and so on the order of sets, as those of a real run do not: the
ranks of one test are started afresh for that.
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
