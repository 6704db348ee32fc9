"""How the tokens of rows are chosen, laid out once for as many steps as the rows stay the same.

By the kernel of the device where it knows all that a row asks for, else by torch. The tokens are the same: on a CPU
torch is asked, too, where the order of summation might decide. N rows, S rows of one kind, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from farspan.engine.request import SamplingParams
from farspan.engine.warp import cuts_of, draws_of, send
from farspan.kernels.sampling.contract import SURE, Chosen
from farspan.kernels.sampling.cuts import Cuts
from farspan.kernels.sampling.dispatch import choose_sampling
from farspan.kernels.sampling.reference import draw
from farspan.kernels.team.quiet import on_one_thread

_GREEDY = SamplingParams()


class Drawing:
    """Of N rows, by what each asks for."""

    def __init__(self, params: Sequence[SamplingParams], like: Tensor) -> None:
        """`like`: logits that are only looked at for their type, device and vocabulary."""
        self._params, self._device, self._vocab_size = params, like.device, like.shape[-1]
        kernel = choose_sampling(like.device.type, like.dtype, like.shape[-1])
        drawn = [i for i, each in enumerate(params) if each.temperature > 0]
        self.draws = bool(drawn)
        """Whether random numbers are needed."""
        by_torch = [i for i in drawn if kernel is None or not (kernel.cuts or _is_plain(params[i]))]
        if kernel is not None and not kernel.cuts and len(by_torch) == len(drawn):
            # Nothing is left for it to draw, and torch finds what is highest in one launch.
            kernel = None
        self._by_torch = self._laid_out(by_torch) if by_torch else None
        # To the kernel those are greedy.
        asked = list(params)
        for i in by_torch:
            asked[i] = _GREEDY
        self._by_kernel = None if kernel is None else (kernel.sample, draws_of(asked, like.device))
        self._none_N = torch.zeros(len(params), dtype=torch.float64, device=like.device)

    def choose(self, logits_NV: Tensor, points_N: Tensor | None, told: Sequence[int] = ()) -> Chosen:
        """`points_N`: the random numbers; none where nothing is drawn. `told`: rows whose lse is wanted, where a kernel
        gives it."""
        points_N = self._none_N if points_N is None else points_N
        if self._by_kernel is None:
            best_N, tokens_N = _best(logits_NV)
            chosen = Chosen(tokens_N, best_N, self._none_N, lse_of(logits_NV, told))
        else:
            sample, draws = self._by_kernel
            chosen = sample(logits_NV, draws, points_N, _mask(told, logits_NV) if told else None)
            # On a GPU that would be to wait for it.
            if self.draws and self._device.type == "cpu":
                unsure = (chosen.margin_N < SURE).nonzero()[:, 0].tolist()
                if unsure:
                    _draw_again(chosen, logits_NV, points_N, *self._laid_out(unsure))
        if self._by_torch is not None:
            _draw_again(chosen, logits_NV, points_N, *self._by_torch)
        return chosen

    def _laid_out(self, rows: Sequence[int]) -> tuple[Tensor, Cuts]:
        like = torch.empty(0, self._vocab_size, dtype=torch.float64, device=self._device)
        return send(rows, torch.long, self._device), cuts_of([self._params[i] for i in rows], like)


def lse_of(logits_NV: Tensor, rows: Sequence[int]) -> Tensor | None:
    """The lse of these rows; none where there is no kernel for it. The same whether anything is chosen beside it."""
    kernel = choose_sampling(logits_NV.device.type, logits_NV.dtype, logits_NV.shape[-1]) if rows else None
    if kernel is None:
        return None
    none_N = torch.zeros(len(logits_NV), dtype=torch.float64, device=logits_NV.device)
    greedy = draws_of([_GREEDY] * len(logits_NV), logits_NV.device)
    return kernel.sample(logits_NV, greedy, none_N, _mask(rows, logits_NV)).lse_N


def _mask(rows: Sequence[int], like: Tensor) -> Tensor:
    there = np.zeros(len(like), dtype=bool)
    there[list(rows)] = True
    return send(there, torch.bool, like.device)


def _is_plain(params: SamplingParams) -> bool:
    return params.top_k == 0 and params.top_p == 1


def _draw_again(chosen: Chosen, logits_NV: Tensor, points_N: Tensor, rows_S: Tensor, cuts: Cuts) -> None:
    chosen.tokens_N[rows_S] = draw(cuts.apply(logits_NV[rows_S].double()), points_N[rows_S])


def _best(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The highest logit of each row, and its token; NaN where there is any."""
    if logits_NV.device.type != "cpu":
        # One look instead of two.
        best_N, tokens_N = logits_NV.max(-1)
        return best_N, tokens_N
    # The same token: widening changes no order, and numpy looks through a row several times faster than torch.
    with on_one_thread():
        logits_nv = (logits_NV if logits_NV.element_size() >= 4 else logits_NV.float()).numpy()
    tokens_n = logits_nv.argmax(-1)
    best_n = np.take_along_axis(logits_nv, tokens_n[:, None], -1)[:, 0]
    return torch.from_numpy(best_n), torch.from_numpy(tokens_n)
