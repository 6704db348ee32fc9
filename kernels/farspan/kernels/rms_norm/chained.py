"""Root-mean-square normalization as a chain of one step. Contract: contract.py."""

from __future__ import annotations

from torch import Tensor

from farspan.kernels.chain.contract import BindChain, Normalize
from farspan.kernels.rms_norm.contract import BindRmsNorm, Kind, RmsNorm


def bind_by(bind_chain: BindChain) -> BindRmsNorm:
    def bind_rms_norm(w_K: Tensor, eps: float, kind: Kind) -> RmsNorm:
        chain = bind_chain([Normalize("x", "y", w_K, eps, kind)], {"x": len(w_K)}, ["y"])
        return lambda x_TK: chain(x_TK if x_TK.stride(1) == 1 else x_TK.contiguous())[0]

    return bind_rms_norm
